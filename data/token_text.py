"""The text of each token as it stands among its neighbours, whatever the tokenizer."""
import re

NO_TEXT = "\ufffd"  # what decoders write for bytes that are no character
RUN = 8  # tokens over which one character, or several that share tokens, may be split
_VISIBLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_HIDDEN = sorted(set(range(256)) - set(_VISIBLE))
# Byte-level tokenizers write a byte as the character of that number, or else as one from 256 on
BYTES = {chr(byte): byte for byte in _VISIBLE} | {
    chr(256 + i): byte for i, byte in enumerate(_HIDDEN)}


def token_texts(tokenizer, ids, known=None):
    """Returns for each of the tokens `ids` of a passage, in order, the text that it adds to the
    tokens before it; joined they are the passage, with its first space where the tokenizer has one.

    Decoded alone, a token of SentencePiece loses its leading space, and a part of a character that
    is split over several tokens is none. Here such a character stands at the first of its tokens,
    and the others have "". Bytes that make no character are written as <0xF0>. known: a dictionary
    that keeps what was decoded, where many passages are.
    """
    ids, known = [int(token) for token in ids], {} if known is None else known
    first = context = _ordinary_token(tokenizer)
    texts, i = [], 0
    while i < len(ids):
        for n in range(1, min(RUN, len(ids) - i) + 1):
            run = tuple(ids[i:i + n])
            if (context, run) not in known:
                known[context, run] = _added_text(tokenizer, context, run)
            text = known[context, run]
            if text is not None:
                break
        else:
            n, text = 1, _bytes_as_text(tokenizer, ids[i])
        texts += [text] + [""] * (n - 1)
        context = run if run == tuple(ids[i:i + n]) else first
        i += n
    return texts


def vocabulary_texts(tokenizer, ids):
    """Returns the text of each of the tokens `ids`, as it reads after another word."""
    context, texts = _ordinary_token(tokenizer), []
    for token in map(int, ids):
        text = _added_text(tokenizer, context, (token,))
        texts.append(_bytes_as_text(tokenizer, token) if text is None else text)
    return texts


def _ordinary_token(tokenizer):
    """Returns a token that means "a", after which another one shows its leading space; as a tuple,
    empty where there is none."""
    return tuple(tokenizer("a", add_special_tokens=False)["input_ids"][-1:])


def _added_text(tokenizer, context, run):
    """Returns the text that the tokens `run` add after the tokens `context`; None where they end or
    begin within a character."""
    def decoded(tokens):
        return tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)

    before, whole = decoded(context) if context else "", decoded(context + run)
    text = whole[len(before):] if whole.startswith(before) else decoded(run)
    if NO_TEXT not in text:
        return text
    parts = [_bytes_of(tokenizer, token) for token in run]
    try:  # the text itself may hold that character
        return None if None in parts else b"".join(parts).decode()
    except UnicodeDecodeError:
        return None


def _bytes_of(tokenizer, token):
    """Returns the bytes of a token of a byte-level tokenizer, or of a token that stands for one
    byte; None of others."""
    piece = tokenizer.convert_ids_to_tokens(token) or ""
    if code := re.fullmatch("<0x([0-9A-F]{2})>", piece):
        return bytes([int(code[1], 16)])
    return bytes(BYTES[char] for char in piece) if set(piece) <= BYTES.keys() else None


def _bytes_as_text(tokenizer, token):
    """Returns the bytes of a token that is no text, as <0xF0>."""
    part = _bytes_of(tokenizer, token)
    return NO_TEXT if part is None else "".join(f"<0x{byte:02X}>" for byte in part)

"""Tokenizers of the kinds that there are, small and made here; and a stand-in for one."""
from tokenizers import decoders, models, normalizers, pre_tokenizers, Tokenizer, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from copies import PROJECT

SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
WORDS = "the file is read here and then a value of each row is kept for the next part".split()
TEXT = [" ".join(WORDS[(i * 7 + j * (3 + i % 5)) % len(WORDS)] for j in range(400)) for i in range(100)]


class Joined:
    """A stand-in for a tokenizer: the text of a passage is that of its tokens, text(token), joined."""
    def __init__(self, text, size=200):
        self.text, self.size = text, size

    def __len__(self):
        return self.size

    def __call__(self, text, add_special_tokens):
        return {"input_ids": []}

    def decode(self, ids, clean_up_tokenization_spaces):
        return "".join(self.text(int(token)) for token in ids)


def fast(tokenizer):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def sentencepiece():
    """As Llama's: a space is a part of the word after it, unknown characters are bytes, and the decoder drops a first space."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    made.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL + BYTES))
    made.pre_tokenizer = None
    return fast(made)


def metaspace():
    """As T5's."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=60, special_tokens=SPECIAL))
    return fast(made)


def word_ends():
    """As GPT's: a token may end its word."""
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder(suffix="</w>")
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=45, special_tokens=SPECIAL, end_of_word_suffix="</w>"))
    return fast(made)


def word_pieces():
    """As BERT's: a token may go on with a word."""
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
    made.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=55, special_tokens=SPECIAL))
    return fast(made)


def byte_level():
    """As GPT-2's: the embedded model's own."""
    return AutoTokenizer.from_pretrained(PROJECT / "embedded" / "model")


KINDS = {maker.__name__: maker for maker in (sentencepiece, metaspace, word_ends, word_pieces, byte_level)}

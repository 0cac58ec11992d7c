"""Parents of a hierarchical SAE with their children and the passages on which they fire."""
import textwrap

import numpy as np

from data.token_text import token_texts

WIDTH = 100     # characters of a line of Markdown


def strongest_passages(windows, tokenizer, places, values, n=3, around=8):
    """Returns the n strongest firings of a unit, each from another window, as dictionaries: the
    texts "before" and "after" the "token" on which it fires, `around` tokens each, and its "value".

    places [firings]: indices into the held-out tokens that count; values [firings].
    """
    seq = windows.tokens.shape[1] - 1
    held_out = windows.heldout_tokens()
    passages, seen = [], set()
    for i in np.argsort(-values, kind="stable"):
        window, offset = divmod(int(held_out[places[i]]), seq)
        if window in seen:
            continue
        seen.add(window)
        row = windows.n_train + window
        texts = token_texts(tokenizer, windows.tokens[row, 1:windows.lengths[row]])
        begin = offset
        while begin and not texts[begin]:  # within a character
            begin -= 1
        passages.append({"before": "".join(texts[max(0, offset - around):begin]),
                         "token": texts[begin],
                         "after": "".join(texts[offset + 1:offset + 1 + around]),
                         "value": round(float(values[i]), 4)})
        if len(passages) == n:
            break
    return passages


def family_tree(windows, tokenizer, levels, families, parents, weights, traces):
    """Returns a list of dictionaries, one for each of `parents`: its rate of firing, passages,
    causal cosines, and its children, each with rate, passages and its weight.

    levels: activity of both levels on the held-out tokens; families: parent -> its children;
    weights [parent, child]: the parents' decoder; traces: for each of `parents` the cosines of what
    ablating it (`parent_cosine`), or a matched control (`control_cosine`), does to the logits with
    what ablating its children does in sum."""
    def unit(activity, i):
        """Returns what is shown of a parent or of a child."""
        places, values = activity.places[i], activity.values[i]
        return {"id": int(i), "rate": float(len(places) / activity.n),
                "passages": strongest_passages(windows, tokenizer, places, values)}

    tree = []
    for parent, trace in zip(parents, traces):
        children = [unit(levels.lower, child) | {"weight": float(weights[parent, child])}
                    for child in families[parent]]
        tree.append(unit(levels.upper, parent) | {
            "cosine": float(np.mean(trace.parent_cosine)),
            "cosine_rival": float(np.mean(trace.control_cosine)), "children": children})
    return tree


def passage_lines(passages):
    """Returns passages as a Markdown list, the token in bold and its value in brackets."""
    def code(text):
        """Returns text as Markdown code in one line; no code for no text."""
        text = text.replace("`", "'").replace("\n", "\\n")
        return f"`{text}`" if text else ""

    return [f"- {code(passage['before'])}**{code(passage['token'])}**{code(passage['after'])} "
            f"({passage['value']:.2f})" for passage in passages]


def case_studies(tree):
    """Returns the content of case_studies.md, made of `family_tree`'s list."""
    introduction = (
        "Parents are latents of level 2 with at least two live children, evenly spaced in the "
        "order of their firing rates; none was selected for how it reads. A child's weight is the "
        "parent's decoder weight. Cosine: between what ablating the parent does to the model's "
        "logits and the sum of what ablating each of its children does, beside the same for a "
        "control matched in rate and size. In passages the token on which the unit fires is bold; "
        "its value follows.")
    lines = ["# Case studies: parents, their children, and passages on which they fire", "",
             textwrap.fill(introduction, WIDTH)]
    for parent in tree:
        lines += ["", f"## Parent {parent['id']}",
                  f"Fires on {parent['rate']:.2%} of the tokens. Cosine {parent['cosine']:.2f}, "
                  f"control {parent['cosine_rival']:.2f}.", "",
                  *passage_lines(parent["passages"])]
        for child in sorted(parent["children"], key=lambda child: -child["weight"]):
            lines += ["", f"Child {child['id']}, weight {child['weight']:.2f}, fires on "
                      f"{child['rate']:.2%} of the tokens:", "",
                      *passage_lines(child["passages"])]
    return "\n".join(lines) + "\n"

"""Parents with their children and the text that fires them, as Markdown."""
import textwrap

import numpy as np


def strongest_passages(windows, strings, places, values, n=3, around=8):
    """The n strongest firings of a unit, each in another window: text before, token, text after, value."""
    keep, found, seen = windows.heldout_tokens(), [], set()
    for i in np.argsort(-values, kind="stable"):
        row, at = divmod(int(keep[places[i]]), windows.tokens.shape[1] - 1)
        if row not in seen:
            seen.add(row)
            text = [strings[t] for t in windows.tokens[windows.n_train + row][:windows.lengths[windows.n_train + row]]]
            found.append(("".join(text[max(1, at + 1 - around):at + 1]), text[at + 1],
                          "".join(text[at + 2:at + 2 + around]), round(float(values[i]), 4)))
        if len(found) == n:
            break
    return found


def family_tree(windows, tokenizer, levels_of_codes, families, parents, weights, traces):
    """Of parents: rate, passages and causal cosines, and of each child its weight [parent, child], rate and passages."""
    strings = tokenizer.batch_decode(np.arange(windows.tokens.max() + 1)[:, None])

    def unit(activity, i):
        return {"id": int(i), "rate": float(len(activity.places[i]) / activity.n),
                "passages": strongest_passages(windows, strings, activity.places[i], activity.values[i])}

    return [unit(levels_of_codes.upper, p) | {
        "cosine": float(np.mean(trace["own"])), "cosine_rival": float(np.mean(trace["rival"])),
        "children": [unit(levels_of_codes.lower, i) | {"weight": float(weights[p, i])} for i in families[p]]}
        for p, trace in zip(parents, traces)]


def case_studies(tree):
    """family_tree as Markdown."""
    def quoted(passage):
        before, token, after, value = (part.replace("`", "'").replace("\n", "\\n") if isinstance(part, str) else part
                                       for part in passage)
        return f"`{before}`**`{token}`**`{after}` ({value:.2f})"

    lines = ["# Case studies: parents, their children, and the text that fires them", "", textwrap.fill(
        "Parents are latents of level 2 that have at least two live children, evenly spaced in the order of their firing "
        "rates; none was selected for how it reads. A child's weight is the parent's decoder weight. Cosine: of what "
        "ablating the parent does to the model's logits with what ablating its children singly does in sum, beside the "
        "same for a rival matched in rate and size. In passages the token that fires is bold; its value follows.", 110)]
    for parent in tree:
        lines += ["", f"## Parent {parent['id']}", f"Fires on {parent['rate']:.2%} of the tokens. Cosine "
                  f"{parent['cosine']:.2f}, rival {parent['cosine_rival']:.2f}.", ""]
        lines += [f"- {quoted(passage)}" for passage in parent["passages"]]
        for child in sorted(parent["children"], key=lambda c: -c["weight"]):
            lines += ["", f"Child {child['id']}, weight {child['weight']:.2f}, on {child['rate']:.2%}:", ""]
            lines += [f"- {quoted(passage)}" for passage in child["passages"]]
    return "\n".join(lines) + "\n"

"""A page that shows which latents of a finished run fire on a text of yours.

    python -m pages.own_text run_1 "a sentence"      or, instead of the text, a file that holds it

Run it in the folder of experiment.py. It writes run_1/own_text.html and prints the strongest
latents; those that run_1/features.html shows are linked to their entries there.
"""
import os
import sys
from pathlib import Path

import numpy as np

from pages.latents_page import three_digits
from pages.ratings import load_features, load_labels
from pages.templates import filled
from runtime.errors import RunnerError

STRONGEST = 40      # latents that the page lists
PER_TOKEN = 5       # strongest latents of a token
PRINTED = 12        # latents that are printed


def strongest_latents(values, most=STRONGEST):
    """Returns the latents that fire, by their largest value, at most so many; values
    [seq, n_latents]."""
    largest = values.max(0)
    order = np.argsort(-largest, kind="stable")[:most]
    return order[largest[order] > 0]


def strongest_by_token(values, most=PER_TOKEN):
    """Returns for each token rows (latent, value) of the latents with its largest values, at most
    so many; values [seq, n_latents]."""
    return [[(int(i), float(row[i])) for i in strongest_latents(row[None], most)] for row in values]


def facts_of(ids, features):
    """Returns for each latent of `ids` what a run's features.json (None: there is none) has of it:
    "shown" (features.html has an entry), and of held-out text "name" (the token on which it fires
    most strongly), "rate", "max" (its largest value) and "activity" (see activity_of)."""
    features = features or {}
    shown = {entry["latent"] for entry in features.get("latents", ())}
    named, facts = features.get("named", {}), []
    for latent in map(int, ids):
        fact = {key: features[key][latent] for key in ("rate", "max", "activity")
                if latent < len(features.get(key, ()))}
        if str(latent) in named:
            fact["name"] = features["strings"][named[str(latent)]]
        facts.append(fact | {"shown": latent in shown})
    return facts


def own_text_page(tokens, values, ids, by_token, run, features=None, labels=None):
    """Returns the page of a text.

    tokens [seq]: its tokens' texts, "" for one that is part of the character before it; values
    [seq, n]: what the latents `ids` [n] are there; by_token: rows (latent, value) of each token, as
    strongest_by_token gives them; run: the name of the run's folder; features: the content of its
    features.json, or None; labels: {latent: what people called it}, or None.
    """
    pairs = [[[int(i), three_digits(column[i])] for i in np.flatnonzero(column)]
             for column in values.T]
    latents = [{"latent": int(latent), "values": rows} | fact
               for latent, rows, fact in zip(ids, pairs, facts_of(ids, features))]
    rows = [[[latent, three_digits(value)] for latent, value in row] for row in by_token]
    return filled("own_text.html", {
        "run": run, "tokens": list(tokens), "latents": latents, "by_token": rows,
        "labels": labels or {}, "has_page": features is not None,
        "heldout": features["tokens"] if features else None})


def latent_lines(tokens, values, ids, features=None):
    """Returns a line of text for each of the latents `ids` [n]: its largest value in values
    [seq, n], where that is, on how many tokens it fires, and where its entry is."""
    lines = []
    for latent, column, fact in zip(ids, values.T, facts_of(ids, features)):
        at = int(column.argmax())
        while at and not tokens[at]:  # within a character
            at -= 1
        entry = f"features.html#latent-{latent}" if fact["shown"] else "not on features.html"
        times = "once" if (n := np.count_nonzero(column)) == 1 else f"{n} times"
        lines.append(f"latent {latent:>6}  {column.max():.3g} on {tokens[at]!r} "
                     f"(token {at + 1}), fires {times}; {entry}")
    return lines


def main():
    """Writes the page, prints its place and the strongest latents."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    folder, text = Path(sys.argv[1]), sys.argv[2]
    if os.path.isfile(text):  # of a text that can be no name of a file too
        text = Path(text).read_text(encoding="utf-8")
    from runtime.load import load_run  # here: it imports torch and the model's library

    try:
        tokens, values = load_run(folder).latents_of(text)
    except RunnerError as error:
        sys.exit(f"own_text: {error}")
    values, features = np.asarray(values), load_features(folder)
    ids = strongest_latents(values)
    shown = values[:, ids]
    page = own_text_page(tokens, shown, ids, strongest_by_token(values), folder.resolve().name,
                         features, load_labels(folder))
    (folder / "own_text.html").write_text(page, encoding="utf-8")
    print(f"{folder / 'own_text.html'}: {len(tokens)} tokens, "
          f"{np.count_nonzero(values.any(0)):,} latents fire; the strongest:")
    print("\n".join(latent_lines(tokens, shown, ids, features)[:PRINTED]))


if __name__ == "__main__":
    main()

"""Rows of text, files of them, and errors that must name what would work."""
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from data.documents import load_documents
from runtime.errors import RunnerError

WORDS = "the cat sat on a mat while rain fell over old stone roofs near quiet harbour towns".split()


def prose(seed, words):
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, words)) + "."


def rows(n=200):
    return [{"text": f"row {i}: {prose(i, 12)}", "source": ("web", "books")[i % 2]} for i in range(n)]


def load(dataset, seed=0):
    return list(load_documents(str(dataset), seed))


def write(path, records):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(r) for r in records))
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".csv":
        pd.DataFrame(records).to_csv(path, index=False)
    else:
        pd.DataFrame(records).to_parquet(path, row_group_size=50)
    return path


def fails(dataset, *expected):
    """The message of the RunnerError, which comes within seconds, is one paragraph and names no address."""
    began = time.monotonic()
    with pytest.raises(RunnerError) as caught:
        load(dataset) if isinstance(dataset, (str, Path)) else load_documents(dataset, 0)
    message = str(caught.value)
    assert time.monotonic() - began < 20          # the hub's own retries take longer; a busy machine needs some of it
    assert "\n" not in message and "://" not in message and len(message) < 700
    for part in expected:
        assert part in message, message
    return message


def error_of(function, *arguments):
    """The message of the RunnerError: one paragraph without addresses."""
    with pytest.raises(RunnerError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert "\n" not in message and "://" not in message and len(message) < 900
    return message

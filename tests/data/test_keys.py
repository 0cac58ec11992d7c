"""Keys of windows: of the code that decides them, and of nothing else in data/."""
import importlib
import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]


class Letters:
    """Makes a token of each letter."""
    is_fast, name_or_path, bos_token_id, eos_token_id = False, "letters", 0, 0

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.fixture
def keys(tmp_path, monkeypatch):
    """keys(file, old, new) -> the keys of windows and of probing windows, with an edit of data/."""
    text = tmp_path / "text.txt"
    text.write_text("a text")

    def keys(file=None, old="", new=""):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(ROOT / "data", folder / "data")
        os.symlink(ROOT / "runtime", folder / "runtime")
        if file:
            source = (folder / "data" / file).read_text()
            assert source.count(old) == 1
            (folder / "data" / file).write_text(source.replace(old, new))
        with monkeypatch.context() as patch:
            for name in [name for name in sys.modules if name.split(".")[0] == "data"]:
                patch.delitem(sys.modules, name)
            patch.syspath_prepend(str(folder))
            windows, tasks = map(importlib.import_module, ("data.windows", "data.tasks"))
            for module in (windows, tasks):
                patch.setattr(module, "cached_windows", lambda *_: None)
            wanted = windows.Wanted(16, 100, 2, 1, 1, 4, 0)
            _, of_windows = windows.load_windows(str(text), Letters(), wanted, folder)
            _, of_probing = tasks.probing_windows(str(text), Letters(), (2, 1), 16, folder)
            for name in [name for name in sys.modules if name.split(".")[0] == "data"]:
                del sys.modules[name]
        return of_windows, of_probing
    return keys


@pytest.mark.parametrize("file, old, new, windows_change, probing_changes", [
    ("windows.py", "ran dry:", "has too few documents:", False, False),
    ("documents.py", "What works: .txt", "These are read: .txt", False, False),
    ("documents.py", "# documents, by a hash", "# of all, by a hash", False, False),
    ("documents.py", "PART_CHARS, SHORTEST_PART = 20_000", "PART_CHARS, SHORTEST_PART = 30_000",
     True, False),
    ("documents.py", "start + size // 2", "start + size // 3", True, False),
    ("code_labels.py", "start -= 1", "start -= 2", True, False),
    ("windows.py", "return windows, None", "return windows[1:], None", True, False),
    ("tasks.py", "(i < n % len(groups))", "(i <= n % len(groups))", False, True),
    ("tasks.py", "MMLU's format", "its format", False, False),
    ("tasks.py", "row.get(\"subject\") or default", "default", False, False),
    ("synthetic.py", "NOISE = 0.1", "NOISE = 0.2", False, False),
])
def test_key(keys, file, old, new, windows_change, probing_changes):
    (windows, probing), (edited_windows, edited_probing) = keys(), keys(file, old, new)
    assert (edited_windows != windows) == windows_change
    assert (edited_probing != probing) == probing_changes

"""The committed runs belong to this code: their settings, the key of what decides their numbers. And what that key sees."""
import platform

import pytest

from copies import copy_template, PROJECT, results, ROOMS
from processes import Copy

REFERENCES = {"run_0": "standard", "run_batch_topk": "batch_topk"}
OF_THE_RUN = {"SAE_VARIANT", "DEVICE"}      # constants that a run may have set otherwise


@pytest.fixture(params=REFERENCES)
def reference(request):
    """(the folder of a committed run, its variant, its recorded settings)."""
    folder = PROJECT / request.param
    if not folder.is_dir():
        pytest.skip(f"there is no {request.param} yet")
    return folder, REFERENCES[request.param], results(PROJECT, request.param)["training"]["config"]


def test_a_reference_has_the_settings_of_the_file(E, reference):
    """Every constant that a run records now is recorded, with its value in the file."""
    _, variant, config = reference
    plain = {name: value for name, value in vars(E).items() if name.isupper() and name not in {"SOURCE", *OF_THE_RUN}
             and isinstance(value, str | int | float | tuple | None)}
    assert config["SAE_VARIANT"] == variant
    assert {name for name in config if name.isupper()} == {*plain, *OF_THE_RUN}
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}
    assert {name: config[name] for name in listed} == listed


def test_a_reference_was_made_by_this_code(E, monkeypatch, reference):
    _, variant, config = reference
    if config["python"].split(".")[:2] != platform.python_version().split(".")[:2]:
        pytest.skip(f"made by Python {config['python']}, whose syntax trees may be others")
    for name in OF_THE_RUN:
        monkeypatch.setattr(E, name, config[name])
    assert config["code"] == E.code_key(E.open_store, E.train, E.evaluate, E.SAE_VARIANTS[variant])


def test_a_reference_is_whole(reference):
    """All steps, and the page of its latents."""
    folder, _, config = reference
    assert (folder / "features.json").is_file()
    assert config["steps_done"] == config["steps_planned"] and config["budget_hit"] is False


# ---- What the keys see ----
# Prints the keys of what a run keeps: its windows, its activations, its controls, its results
KEYS = """
import experiment as E
from pathlib import Path
from types import SimpleNamespace
import data.windows
from data.windows import stand_in_windows

data.windows.cached_windows = lambda path, dataset, make: stand_in_windows(E.CONTEXT_LENGTH, E.FORGET)
E.Store.collect = lambda self, get_model, layer: None
config, layer = E.load_config(E.MODEL_NAME, E.LAYER, E.CONTEXT_LENGTH)
windows = data.windows.load_windows(E.DATASET, E.load_tokenizer(), E.Wanted(32, 8192, 24, 8, 4, 32, 42), Path("tokens"))[1]
store = E.open_store(config, layer, Path("cache"))[0]
E.cached_json = lambda path, compute: print(path.name) or dict.fromkeys(E.Controls._fields)
print(windows)
print(store.folder.name)
E.controls(SimpleNamespace(store=store, sae=SimpleNamespace(d_sae=384), live_rule=E.LiveRule(50, 10)))
print(E.code_key(E.open_store, E.train, E.evaluate, E.SAE))
"""
PARTS = ("windows", "activations", "controls", "results")


def keys(folder):
    """Returns {part: its key} of a copy of the template."""
    (folder / "keys.py").write_text(KEYS)
    done = Copy(folder, ["keys.py"], folder / "cache").wait()
    assert done.code == 0, done.stderr
    return dict(zip(PARTS, [line for line in done.stdout.splitlines() if not line.startswith("memory: ")], strict=True))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """(a copy of the template with rooms of its own, its keys)."""
    folder = tmp_path_factory.mktemp("keys") / "tree"
    copy_template(folder, DATASET="text.txt")
    (folder / "text.txt").write_text("text")
    for room in set(ROOMS) - {"embedded"}:
        own = {path.name: path.read_text() for path in (PROJECT / room).glob("*.*") if path.is_file()}
        (folder / room).unlink()
        (folder / room).mkdir()
        for name, text in own.items():
            (folder / room / name).write_text(text)
    return folder, keys(folder)


CHANGES = {                  # file, a text there, what stands in its place, the parts that are made again
    "a message": ("runtime/errors.py", '"Try: free disk space, or set SAE_CACHE_DIR to a larger disk."', '"Try: a larger disk."', ()),
    "a message of the rule of windows": ("data/windows.py", '"Lower it, or take a larger data set.")', '"Lower it, or take more data.")', ()),
    "a rule of windows": ("data/windows.py", "least = min(body, wanted.min_window)", "least = min(body, wanted.min_window) + 1",
                          ("windows", "activations", "results")),
    "a metric": ("experiment.py", "cosine = encoded.dot /", "cosine = 2 * encoded.dot /", ("results",)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_only_what_a_change_decides_is_made_again(tree, change):
    (folder, before), (name, old, new, again) = tree, CHANGES[change]
    path = folder / name
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    after = keys(folder)
    path.write_text(text)
    assert {part for part in PARTS if after[part] != before[part]} == set(again)

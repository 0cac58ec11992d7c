"""Keys of code: what changes them and what does not, in a small project that each test imports."""
import functools
import importlib.util
import os
import runpy
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
from runtime.provenance import code_key, sources_key, write_sources

SCRIPT = '''
"""A script."""
from contextlib import contextmanager
from functools import lru_cache, partial
import rooms_helper
from rooms_helper import SCALE, scaled as rescaled
from runtime.files import fingerprint

LIMIT = 3  # tokens
TABLE = {"even": [0, 2]}
LOWEST = HIGHEST = None
HERE = [__file__]


class Base:
    """A base."""
    def rule(self, x):
        return x + 1


class Derived(Base):
    def other(self):
        return helper(2)

    def unrelated(self):
        return LOWEST


def helper(x):
    return x * 2


def unused(x):
    return x


def mean_of(x):
    """Returns a mean."""
    # a comment
    if x < 0:
        raise ValueError(f"{x} is negative")
    print("a message", x)
    return helper(x) + LIMIT + len(TABLE["even"]) + rescaled(x) + SCALE + len(HERE)


def by_module(x):
    return rooms_helper.scaled(x)


def with_local_import(x):
    from data.code_labels import first_character
    return first_character(x, 0, 0)


def plumbing(x):
    return fingerprint(x)


def even(n):
    return n == 0 or odd(n - 1)


def odd(n):
    return n != 0 and even(n - 1)


@lru_cache
def cached(x):
    return helper(x)


@contextmanager
def scope():
    yield helper(1)


THREE = partial(helper, 3)
BUILT = partial(helper, 3)
UNSTABLE = object()
LAMBDAS = (lambda x: x + 1,
           lambda x: helper(x))
'''
HELPER = '''
SCALE = 0.5
FACTOR = 4


def scaled(x):
    return x * FACTOR
'''


@pytest.fixture
def load(tmp_path, monkeypatch):
    """load(old, new, helper_old, helper_new) -> the edited script as a module, in a folder of its
    own whose runtime/ and data/ are links."""
    def load(old="", new="", helper_old="", helper_new=""):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for room in ("data", "runtime"):
            os.symlink(ROOT / room, folder / room)
        assert old in SCRIPT and helper_old in HELPER
        helper = HELPER.replace(helper_old, helper_new) if helper_old else HELPER
        (folder / "experiment.py").write_text(SCRIPT.replace(old, new) if old else SCRIPT)
        (folder / "rooms_helper.py").write_text(helper)
        for name in ("rooms_helper", "experiment_under_test"):
            spec = importlib.util.spec_from_file_location(
                name, folder / ("experiment.py" if name.startswith("experiment") else f"{name}.py"))
            module = importlib.util.module_from_spec(spec)
            monkeypatch.setitem(sys.modules, name, module)
            spec.loader.exec_module(module)
        return module
    return load


@pytest.mark.parametrize("old, new", [
    ("# a comment", "# another\n\n"),
    ('"""Returns a mean."""', '"""Returns it."""\n    "and more"'),
    ("is negative", "is below zero"),
    ('    print("a message", x)\n', ""),
    ("    return x\n", "    return -x\n"),
    ("LIMIT = 3  # tokens", "LIMIT = 1 + 2"), ("return x + 1", "return x + 2"),
])
def test_key_is_of_the_rule_alone(load, old, new):
    assert code_key(load(old, new).mean_of) == code_key(load().mean_of)


@pytest.mark.parametrize("old, new", [
    ("helper(x) + LIMIT", "helper(x) - LIMIT"), ("return x * 2", "return x * 3"),
    ("LIMIT = 3", "LIMIT = 4"), ("x < 0", "x < 1"), ("[0, 2]", "[0, 4]"),
    ("import SCALE, scaled", "import FACTOR as SCALE, scaled"),
])
def test_key_changes_with_a_rule_a_helper_and_a_constant(load, old, new):
    assert code_key(load(old, new).mean_of) != code_key(load().mean_of)


def test_key_changes_with_another_module(load):
    edits = (("", ""), ("x * FACTOR", "x / FACTOR"), ("FACTOR = 4", "FACTOR = 5"))
    keys = []
    for old, new in edits:
        module = load(helper_old=old, helper_new=new)
        keys.append([code_key(rule) for rule in (module.mean_of, module.by_module, module.even)])
    for_mean, by_module, for_even = map(set, zip(*keys))
    assert len(for_mean) == len(by_module) == 3 and len(for_even) == 1


def test_key_follows_the_present_value_of_a_constant(load):
    module = load()
    before = code_key(module.mean_of)
    module.LIMIT = 4
    assert code_key(module.mean_of) == code_key(load("LIMIT = 3", "LIMIT = 4").mean_of) != before


def test_key_of_a_class_counts_bases_and_methods(load):
    before = load()
    edits = (("x + 1", "x + 2"), ("helper(2)", "helper(3)"), ("return x * 2", "return x * 3"))
    for old, new in edits:
        assert code_key(load(old, new).Derived) != code_key(before.Derived)
    method, other = before.Derived.other, load("return LOWEST", "return 0")
    assert code_key(method) == code_key(other.Derived.other) == code_key(other.Derived().other)
    assert code_key(before.Derived) != code_key(other.Derived)


def test_a_table_of_classes_does_not_count(load):
    """One of them is given beside it: a new variant changes no key but its own."""
    table = "\n\nTABLE = {'derived': Derived}\n\n\ndef made(name):\n    return TABLE[name]()\n"
    end = SCRIPT[SCRIPT.rindex("\n\n"):]
    before, others = load(end, end + table), load(end, end + table.replace("}", ", 'other': int}"))
    changed = load("return LOWEST", "return 0")
    assert code_key(before.made) == code_key(others.made)
    assert code_key(before.made, before.Derived) == code_key(others.made, others.Derived)
    assert code_key(before.Derived) != code_key(changed.Derived)


def test_cycles_end_and_count(load):
    before, after = load(), load("n != 0 and", "n and")
    assert code_key(before.even) == code_key(load().even) != code_key(after.even)


def test_wrapped_functions_partials_and_lambdas_count(load):
    before, after = load(), load("return x * 2", "return x * 3")

    def parts(module):
        last = module.LAMBDAS[1]
        return module.cached, module.scope, module.THREE, last, {"a": [module.helper]}

    for old, same, new in zip(parts(before), parts(load()), parts(after)):
        assert code_key(old) == code_key(same) != code_key(new)
    assert code_key(before.LAMBDAS[0]) == code_key(after.LAMBDAS[0])
    assert code_key(before.THREE) != code_key(functools.partial(before.helper, 4))


def test_plumbing_does_not_count_and_a_local_import_does(load, monkeypatch):
    import data.code_labels
    import runtime.provenance as provenance
    module, content, reached = load(), provenance.content, []

    def noted(node):
        reached.append(node.name)
        return content(node)

    monkeypatch.setattr(provenance, "content", noted)
    code_key(module.plumbing)
    assert reached == ["plumbing"]
    code_key(module.with_local_import)
    assert "first_character" in reached and data.code_labels.first_character


def test_other_parts_count_by_their_repr(load):
    given = ((1, 2), (2, 1), ((1, 2),), ("1", 2), (1, [2]), ({1: 2},), (1, None), ())
    keys = [code_key(*parts) for parts in given]
    assert len(set(keys)) == len(keys)
    with pytest.raises(ValueError, match="the same in every process"):
        code_key(load().UNSTABLE)


def test_a_script_run_as_main_has_the_key_of_the_imported_one(load):
    module = load()
    names = runpy.run_path(module.__file__, run_name="__main__")
    assert code_key(names["mean_of"]) == code_key(module.mean_of)
    assert code_key(names["Derived"]) == code_key(module.Derived)


def test_sources_are_whole_and_the_same_bytes(tmp_path):
    script, archives = "script = 1\n", []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_sources(tmp_path / name, script)
        archives.append((tmp_path / name / "sources.zip").read_bytes())
    assert archives[0] == archives[1]
    assert (tmp_path / "a/experiment.py").read_text() == script
    with zipfile.ZipFile(tmp_path / "a/sources.zip") as archive:
        names = archive.namelist()
        kept = archive.read("runtime/provenance.py")
    assert kept == (ROOT / "runtime/provenance.py").read_bytes()
    assert {"data/windows.py", "pages/latents_page.py"} <= set(names)
    assert not any("__pycache__" in name for name in names)
    assert sources_key(script) == sources_key(script) != sources_key("script = 2\n")

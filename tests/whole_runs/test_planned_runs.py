"""Every run that an idea plans, small, and the template as a harness copies it: deep in a tree, under a name with spaces."""
import ast
import re
import shutil
import subprocess
import sys

import pytest

from copies import copy_template, edit, PROJECT, results, SMALL
from processes import run, run_in_turn
from template_texts import PLANNED, plans, TEX, tracked


def set_constants(folder, values):
    """Edits the lines of experiment.py that assign them, alone or beside others."""
    path, values = folder / "experiment.py", dict(values)
    lines = path.read_text().splitlines(keepends=True)
    for statement in ast.parse("".join(lines)).body:
        if not isinstance(statement, ast.Assign):
            continue
        targets, value = statement.targets[0], statement.value
        alone = isinstance(targets, ast.Name)
        names = [ast.unparse(target) for target in ([targets] if alone else targets.elts)]
        if not set(names) & set(values):
            continue
        old = [value] if alone else value.elts
        new = ", ".join(repr(values.pop(name)) if name in values else ast.unparse(v) for name, v in zip(names, old))
        assert statement.lineno == statement.end_lineno
        lines[statement.lineno - 1] = f"{', '.join(names)} = {new}\n"
    assert not values, f"experiment.py assigns no {sorted(values)}"
    path.write_text("".join(lines))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("system", PLANNED)
def test_every_planned_run_ends_with_results(E, cache, tmp_path, system):
    """On small settings; runs with the same constants once."""
    if system not in E.SAE_VARIANTS:
        pytest.skip(f"there is no {system} yet")
    folders = {}
    for number, letter, constants in plans()[system]:
        if constants not in folders.values():
            folder = copy_template(tmp_path / f"run_{number}{letter}")
            small = {name: SMALL[name] for name in ("TARGET_L0", "BATCH_TOKENS", "EXPANSION") if name in constants}
            small |= {"LEVEL_WIDTHS": (48, 24)} if "LEVEL_WIDTHS" in constants else {}
            small |= {"CONTEXT_LENGTH": 64} if "unlearning" in constants.get("EVALS", ()) else {}    # its gate's tokens
            small |= {"SYNTHETIC_TASKS": ("grammar",), "SYNTHETIC_RHOS": (1.0,), "SYNTHETIC_TOKENS": 16_384}
            set_constants(folder, constants | {"EPOCHS_SCALE": 0.25 * constants.get("EPOCHS_SCALE", 1.0)} | small)
            folders[folder] = constants
    for folder, finished in run_in_turn(list(folders), cache).items():
        assert finished.code == 0, f"{folder.name}: {finished.stderr}"
        entries, wanted = results(folder), folders[folder]
        assert set(entries) == set(wanted.get("EVALS", E.EVALS)) and all("means" in e for e in entries.values())
        config = next(iter(entries.values()))["config"]
        for name in {"SAE_VARIANT", "ABLATE", "SEEDS", "TEMPERATURE", "TRAIN_ON", "WINDOW", "HEADS"} & set(wanted):
            assert config[name] == (list(wanted[name]) if type(wanted[name]) is tuple else wanted[name])


# ---- The copy ----
@pytest.fixture(scope="module")
def copied(tmp_path_factory, cache):
    """(the template far down in a tree, after a small run and its plots; the run)."""
    folder = tmp_path_factory.mktemp("copy") / "results of ideas" / "a" / "b" / "c" / "20260101_120000_an idea, its name"
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(PROJECT / name, folder / name)
    edit(folder, **SMALL, SAE_VARIANT="topk")
    finished = run(folder, cache)
    plotted = subprocess.run([sys.executable, "plot.py"], cwd=folder, capture_output=True, text=True, timeout=600)
    assert plotted.returncode == 0, plotted.stderr
    return folder, finished


def test_the_copy_runs_where_it_lies(copied):
    folder, finished = copied
    assert finished.code == 0 and finished.stderr == "", finished.stderr
    assert "preflight passed" in finished.stdout
    assert results(folder)["core"]["config"]["SAE_VARIANT"] == "topk"
    assert (folder / "notes.txt").read_bytes() == (PROJECT / "notes.txt").read_bytes()     # they are the harness's


def test_its_figures_are_drawn_by_plot(copied):
    figures = re.findall(r"\\includegraphics.*?{(.*?)}", TEX)
    assert figures and len(set(figures)) == len(figures)
    assert set(figures) <= {path.name for path in copied[0].glob("*.png")}


@pytest.mark.parametrize("again", [False, True], ids=["first", "with a reference added later"])
def test_it_compiles(copied, again):
    if not shutil.which("pdflatex") or not shutil.which("bibtex"):
        pytest.skip("there is no pdflatex with bibtex here")
    latex = copied[0] / "latex"
    if again:
        added = "@misc{added2020later,\n  title={Later},\n  author={Writer, A.},\n  year={2020}\n}\n"
        text = TEX.replace(r"\end{filecontents}", added + r"\end{filecontents}")
        (latex / "template.tex").write_text(text.replace("METHOD HERE", r"\citet{added2020later}"))
    for command in (["pdflatex", "-interaction=nonstopmode", "template.tex"], ["bibtex", "template"],
                    *[["pdflatex", "-interaction=nonstopmode", "template.tex"]] * 2):
        done = subprocess.run(command, cwd=latex, capture_output=True, text=True, errors="replace", timeout=120)
        assert done.returncode == 0, done.stdout[-2_000:]
    log = " ".join((latex / "template.log").read_text(errors="replace").split())
    assert (latex / "template.pdf").read_bytes().startswith(b"%PDF") and "undefined" not in log, log[-2_000:]
    assert again == ("added2020later" in (latex / "template.bbl").read_text())

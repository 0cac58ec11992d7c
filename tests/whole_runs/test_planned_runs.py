"""Every run that an idea plans, small, and the template as a harness copies it: deep in a tree, under a name with spaces."""
import re
import shutil
import subprocess
import sys

import pytest

from copies import edit, FEWER, PROJECT, results, SMALL
from processes import run
from runtime.preflight import preflight_sandbox
from template_texts import PLANNED, plans, TEX, tracked


# What evaluations measure with, where tests need only that they end
TINY = FEWER | dict(GATE_TOKENS=8)
ONCE = {"recovery", "sparse_probing", "unlearning"}     # for each variant and MATCHER: slow, and the same whatever else a plan sets


@pytest.mark.parametrize("system", PLANNED)
def test_every_planned_run_passes_the_preflight(E, tmp_path, monkeypatch, system):
    """Through every stage, evaluation and result, on tiny data and small settings; runs with the same constants once."""
    made, write, seen, passed = [], E.write_results, [], set()
    monkeypatch.setattr(E, "write_results", lambda *parts: made.append(write(*parts)))
    for number, letter, constants in plans()[system]:
        if constants in seen:
            continue
        small = {name: SMALL[name] for name in ("TARGET_L0", "BATCH_TOKENS", "EXPANSION") if name in constants}
        small |= {"LEVEL_WIDTHS": (48, 24)} if "LEVEL_WIDTHS" in constants else {}
        kind, wanted = (constants["SAE_VARIANT"], constants.get("MATCHER")), constants | small
        if "EVALS" in constants:
            wanted["EVALS"] = tuple(name for name in constants["EVALS"] if (kind, name) not in passed)
        with monkeypatch.context() as patch:
            for name, value in (SMALL | TINY | wanted).items():
                patch.setattr(E, name, value)
            E.check_config()
            config, _ = E.load_config(E.MODEL_NAME, E.LAYER, E.CONTEXT_LENGTH)
            with preflight_sandbox():
                E.preflight(config, tmp_path)
        entries = made.pop()
        assert set(entries) == {"training", *wanted.get("EVALS", E.EVALS)} and all("means" in e for e in entries.values()), number
        assert {name: entries["training"]["config"][name] for name in wanted} == wanted, (number, letter)
        seen.append(constants)
        passed |= {(kind, name) for name in ONCE & set(entries)}


# ---- The copy ----
@pytest.fixture(scope="module")
def copied(tmp_path_factory, lab):
    """(the template far down in a tree, after a small run and its plots; the run)."""
    folder = tmp_path_factory.mktemp("copy") / "results of ideas" / "a" / "b" / "c" / "20260101_120000_an idea, its name"
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(PROJECT / name, folder / name)
    edit(folder, **SMALL | FEWER, SAE_VARIANT="topk")
    finished = run(folder, lab.cache)
    plotted = subprocess.run([sys.executable, "plot.py"], cwd=folder, capture_output=True, text=True, timeout=600)
    assert plotted.returncode == 0, plotted.stderr
    return folder, finished


def test_the_copy_runs_where_it_lies(copied):
    folder, finished = copied
    assert finished.code == 0 and finished.stderr == "", finished.stderr
    assert "preflight passed" in finished.stdout
    assert results(folder)["training"]["config"]["SAE_VARIANT"] == "topk"
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

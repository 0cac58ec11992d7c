"""The files that a harness reads, and the template as it copies it: deep in a tree, under a name with spaces."""
import ast
import json
import re
import shutil
import subprocess
import sys

import pytest
from copies import PROJECT, SMALL, copy_template, edit, results, run, run_in_turn
from test_health import parser_traps

FIELDS = ("Name", "Title", "Experiment", "Interestingness", "Feasibility", "Novelty")
PLANNED = {"temporal": 5, "temporal_context": 10, "compositional": 4, "hierarchical": 5, "temporal_adaptation": 5}
RUN = re.compile(r"^- (\d+)([a-z]?), (.+?): (SAE_VARIANT = .+)$", flags=re.M)
LARGEST = 15 * 2 ** 20
PROMPT, IDEAS = (json.loads((PROJECT / name).read_text()) for name in ("prompt.json", "seed_ideas.json"))
TEX = (PROJECT / "latex" / "template.tex").read_text()


def assigned(text):
    """{constant: value} of assignments with semicolons between."""
    return {statement.targets[0].id: ast.literal_eval(statement.value) for statement in ast.parse(text).body}


def plans():
    """{system: [(number, letter, {constant: value})]} of the ideas, by the variant of their first run."""
    found = [[(int(number), letter, assigned(text)) for number, letter, _, text in RUN.findall(idea["Experiment"])]
             for idea in IDEAS]
    return {runs[0][2]["SAE_VARIANT"]: runs for runs in found}


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


# --- prompt.json and seed_ideas.json ---------------------------------------------------------------------------------
def texts():
    return {"prompt": "\n".join(PROMPT.values())} | {idea["Name"]: idea["Experiment"] for idea in IDEAS}


def test_the_prompt_has_the_harness_s_fields():
    assert set(PROMPT) == {"system", "task_description"} and all(type(v) is str and v for v in PROMPT.values())


def test_the_prompt_names_the_variants_that_there_are(E):
    named = re.search(r"SAE_VARIANTS: (.+?) are published baselines; (.+?) are the systems",
                      PROMPT["task_description"])
    baselines, systems = (set(re.split(r", | and ", part)) for part in named.groups())
    assert systems == set(PLANNED) and not baselines & systems
    assert baselines < set(E.SAE_VARIANTS) <= baselines | systems


def test_the_ideas_have_the_harness_s_fields():
    for idea in IDEAS:
        assert tuple(idea) == FIELDS
        assert re.fullmatch(r"[a-z][a-z0-9_]*", idea["Name"])          # names a folder and a PDF
        assert all(type(idea[field]) is str and idea[field] for field in FIELDS[:3])
        assert all(type(idea[field]) is int and 1 <= idea[field] <= 10 for field in FIELDS[3:])
    assert len({idea["Name"] for idea in IDEAS}) == len(IDEAS)


def test_every_planned_run_is_there():
    """29 rows of plans, each at least one run, in order; nothing that looks like a run is left unread."""
    assert {system: runs[-1][0] for system, runs in plans().items()} == PLANNED and sum(PLANNED.values()) == 29
    for idea, (system, runs) in zip(IDEAS, plans().items()):
        assert len(runs) == len(re.findall(r"^- ", idea["Experiment"], flags=re.M))
        assert sorted({number for number, _, _ in runs}) == list(range(1, PLANNED[system] + 1))
        keys = [(number, letter) for number, letter, _ in runs]
        assert keys == sorted(keys) and len(set(keys)) == len(keys)


def test_nothing_in_the_texts_trips_an_editor_s_parser():
    for text in (*texts().values(), TEX, (PROJECT / "notes.txt").read_text()):
        assert not parser_traps(text) and "://" not in text


@pytest.mark.parametrize("system", PLANNED)
def test_what_an_idea_names_exists(E, system):
    """Constants that may be edited, and names of metrics, losses and functions."""
    if system not in E.SAE_VARIANTS:
        pytest.skip(f"there is no {system} yet")
    settings = E.SOURCE.split("# ---- CONFIG")[1].split("# FIXED PROTOCOL")[0]
    text = next(t for t in texts().values() if f'SAE_VARIANT = "{system}"' in t)
    known = "".join((PROJECT / name).read_text() for name in (
        "README.md", "experiment.py", "plot.py", "embedded/corpus.py"))
    for word in set(re.findall(r"\b[A-Z]+_[A-Z_]+\b", text)):
        assert re.search(rf"^(\w+, )*{word}\b", settings, flags=re.M), word
    for word in set(re.findall(r"\b[a-z]+_[a-z_]+\b", text + texts()["prompt"])) - set(PLANNED):
        assert re.search(rf"\b{word}\b", known), word


@pytest.mark.parametrize("system", PLANNED)
def test_every_planned_run_passes_the_checks_of_the_settings(E, monkeypatch, system):
    if system not in E.SAE_VARIANTS:
        pytest.skip(f"there is no {system} yet")
    for number, letter, constants in plans()[system]:
        with monkeypatch.context() as patch:
            for name, value in constants.items():
                patch.setattr(E, name, value)
            E.corpus.check_config(vars(E), E.SAE_VARIANTS, E.EVALUATIONS)


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


# --- the copy --------------------------------------------------------------------------------------------------------
def tracked():
    """Files that a clone has, or will have with the next commit."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=PROJECT,
                            capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: what belongs to the template cannot be told")
    return [name for name in listed.stdout.split("\0") if name and (PROJECT / name).is_file()]


def test_the_template_is_small_and_whole():
    files = tracked()
    assert {"experiment.py", "plot.py", "notes.txt", "prompt.json", "seed_ideas.json", "latex/template.tex",
            "run_0/final_info.json"} <= set(files)
    assert sum((PROJECT / name).stat().st_size for name in files) < LARGEST
    assert not [name for name in files if re.match(r"latex/(?!template\.tex)|ideas\.json|run_[1-9]", name)]


def test_notes_are_laid_out_as_the_harness_writes_them():
    starts = [line.split(":")[0] for line in (PROJECT / "notes.txt").read_text().splitlines() if line]
    assert starts == ["# Title", "# Experiment description", "## Run 0", "Results", "Description"]


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


# --- latex/template.tex ----------------------------------------------------------------------------------------------
def test_every_citation_resolves():
    bib = re.search(r"\\begin{filecontents}{references.bib}(.*?)\\end{filecontents}", TEX, flags=re.S)[1]
    keys = re.findall(r"^@\w+\{(\w+),", bib, flags=re.M)
    cited = [key.strip() for keys in re.findall(r"\\cite[a-z]*{([^}]*)}", TEX) for key in keys.split(",")]
    assert len(set(keys)) == len(keys) >= 10 and set(cited) <= set(keys) and len(set(cited)) >= 10
    for entry in re.split(r"\n(?=@)", bib.strip()):
        arxiv = re.search(r"arXiv:(\d\d)\d\d\.\d{4,5}\}", entry)
        assert all(re.search(rf"^  {field}=\{{.+\}}", entry, flags=re.M) for field in ("title", "author", "journal"))
        assert not arxiv or f"year={{20{arxiv[1]}}}" in entry, entry


def test_its_sections_are_those_that_the_harness_asks_for():
    sections = re.findall(r"\\section{([^}]*)}", TEX)
    assert sections == ["Introduction", "Related Work", "Background", "Method", "Experimental Setup", "Results",
                        "Conclusion"]
    blanks = re.findall(r"^.*?([A-Z ]{4,} HERE).*$", TEX, flags=re.M)
    assert len(blanks) == len(set(blanks)) >= len(sections)             # each a different text to search for


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


def test_a_linter_finds_nothing():
    if not shutil.which("chktex"):
        pytest.skip("there is no chktex here")
    found = subprocess.run(["chktex", "template.tex", "-q", "-n2", "-n24", "-n13", "-n1"], cwd=PROJECT / "latex",
                           capture_output=True, text=True)
    assert not found.stdout, found.stdout

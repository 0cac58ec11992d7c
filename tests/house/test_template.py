"""The files that a harness reads."""
import re
import shutil
import subprocess

import pytest

from copies import PROJECT
from template_texts import IDEAS, PLANNED, plans, PROMPT, TEX, texts, tracked
from test_health import parser_traps

FIELDS = ("Name", "Title", "Experiment", "Interestingness", "Feasibility", "Novelty")
LARGEST = 15 * 2 ** 20


# ---- prompt.json and seed_ideas.json ----
def test_the_prompt_has_the_harness_s_fields():
    assert set(PROMPT) == {"system", "task_description"} and all(type(v) is str and v for v in PROMPT.values())


def test_the_prompt_names_the_variants_that_there_are(E):
    named = re.search(r"SAE_VARIANTS: (.+?) are published baselines; (.+?) are the systems under study; (\w+) is a variant of ours",
                      PROMPT["task_description"])
    baselines, systems, ours = (set(re.split(r", | and ", part)) for part in named.groups())
    assert systems == set(PLANNED) and not baselines & systems
    assert baselines < set(E.SAE_VARIANTS) <= baselines | systems | ours


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
    settings = E.SOURCE.split("# region Config\n")[1].split("# endregion")[0]
    text = next(t for t in texts().values() if f'SAE_VARIANT = "{system}"' in t)
    known = "".join((PROJECT / name).read_text() for name in (
        "README.md", "experiment.py", "plot.py"))
    known += "".join(path.read_text() for room in ("data", "runtime", "pages") for path in (PROJECT / room).glob("*.py"))
    for word in set(re.findall(r"\b[A-Z]+_[A-Z_]+\b", text)):
        assert re.search(rf"^{word} = ", settings, flags=re.M), word
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
            E.check_config()


# ---- The files of the template ----
def test_the_template_is_small_and_whole():
    files = tracked()
    assert {"experiment.py", "plot.py", "notes.txt", "prompt.json", "seed_ideas.json", "latex/template.tex",
            "run_0/final_info.json"} <= set(files)
    assert sum((PROJECT / name).stat().st_size for name in files) < LARGEST
    assert not [name for name in files if re.match(r"latex/(?!template\.tex)|ideas\.json|run_[1-9]", name)]


def test_notes_are_laid_out_as_the_harness_writes_them():
    starts = [line.split(":")[0] for line in (PROJECT / "notes.txt").read_text().splitlines() if line]
    assert starts == ["# Title", "# Experiment description", "## Run 0", "Results", "Description"]


# ---- latex/template.tex ----
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


def test_a_linter_finds_nothing():
    if not shutil.which("chktex"):
        pytest.skip("there is no chktex here")
    found = subprocess.run(["chktex", "template.tex", "-q", "-n2", "-n24", "-n13", "-n1"], cwd=PROJECT / "latex",
                           capture_output=True, text=True)
    assert not found.stdout, found.stdout

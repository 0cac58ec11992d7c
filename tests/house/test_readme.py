"""README.md and docs/ are true: their links, commands, constants and keys of results exist, and
their examples run as they are written."""
import inspect
import json
import os
import re

import pytest
from copies import copy_template, edit, PROJECT, results, substitute, write_text_data
from processes import run

PAGES = {str(path.relative_to(PROJECT)): path.read_text()
         for path in (PROJECT / "README.md", *(PROJECT / "docs").glob("*.md"))}
README, ADDING = PAGES["README.md"], PAGES["docs/adding-a-variant.md"]
SOURCE = (PROJECT / "experiment.py").read_text()
NO_CONSTANTS = {"SAE_CACHE_DIR"}  # a variable of the environment
# Parts of the names in docs/metrics.md that stand for several words
PLACEHOLDERS = {"REFERENCE", "PARAMETER", "LABEL", "STRATEGY", "GROUP", "TASK", "CONTROL", "METHOD",
                "K", "N"}
# in committed runs of earlier code alone
RETIRED = {"energy_first_fifth", "autocorrelation_lag1_weighted"}
RETIRED_ENDINGS = "_one_rate", "_last_batch"


def anchors(text):
    """Returns the anchors of the headings of a Markdown text, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page):
    """Returns the targets of the links and images of a page."""
    return re.findall(r"\]\(([^)\s]+)\)", PAGES[page])


def example(page, name):
    """Returns the Python code that follows the mark `<!-- example: name -->` on a page."""
    pattern = rf"<!-- example: {name} -->\n```python\n(.*?)```"
    return re.search(pattern, PAGES[page], flags=re.S)[1]


def code_of(page):
    """Returns the shell blocks and the inline code of a page."""
    pairs = re.findall(r"```sh\n(.*?)```|`([^`\n]+)`", PAGES[page], flags=re.S)
    return [block or inline for block, inline in pairs]


def test_the_readme_is_short():
    assert len(README.encode()) <= 10_000


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for target in links(page):
        place, _, anchor = target.partition("#")
        file = (PROJECT / page).parent / place if place else PROJECT / page
        assert "://" not in target and file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), target


def test_every_page_can_be_reached_from_the_readme():
    reached, waiting = set(), {"README.md"}
    while waiting:
        page = waiting.pop()
        reached.add(page)
        places = [target.partition("#")[0] for target in links(page)]
        found = {os.path.normpath(os.path.join(os.path.dirname(page), place)) for place in places}
        waiting |= found & set(PAGES) - reached
    assert reached == set(PAGES)


def test_commands_are_targets_of_the_makefile_or_scripts():
    makefile = (PROJECT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.+)$", makefile, flags=re.M)[1].split())
    code = "\n".join(part for page in PAGES for part in code_of(page))
    commands = set(re.findall(r"^(?:\w+=\S+ )?make (\w+)", code, flags=re.M))
    assert {"run", "test", "env"} <= commands <= targets
    for script in re.findall(r"\bpython ([\w/]+\.py)", code):
        assert (PROJECT / script).exists(), script
    assert "make test" in (PROJECT / ".ci" / "run").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    rooms = "data|runtime|pages|embedded|bench|tests|docs|latex"
    for path in re.findall(rf"(?<![\w/.-])(?:\.\./)?((?:{rooms})/[\w./-]*\w)", PAGES[page]):
        assert (PROJECT / path).exists(), path


@pytest.mark.parametrize("call", sorted(set(re.findall(r"`(\w+\([\w, ]*\))`", ADDING))))
def test_functions_have_the_parameters_that_are_named(E, call):
    name, parameters = call.rstrip(")").split("(")
    function = getattr(E.SAE if hasattr(E.SAE, name) else E, name)
    named = [part for part in inspect.signature(function).parameters if part != "self"]
    assert ", ".join(named) == parameters


@pytest.mark.parametrize("page", PAGES)
def test_every_constant_that_is_named_exists(page):
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGES[page], flags=re.S) + code_of(page))
    for name in set(re.findall(r"\b[A-Z]+(?:_[A-Z0-9]+)+\b", code)) - NO_CONSTANTS:
        assert re.search(rf"\b{name}\b", SOURCE), name


def test_the_readme_has_a_line_and_a_result_for_every_variant():
    table = re.search(r"^SAE_VARIANTS = \{(.*?)\}", SOURCE, flags=re.M | re.S)[1]
    rows = re.findall(r"^\| `(\w+)` \|", README, flags=re.M)
    for name in re.findall(r'"(\w+)":', table):
        assert rows.count(name) == 2, name


def test_every_number_of_the_committed_runs_is_defined():
    patterns = []
    for name in re.findall(r"`([\w.]*[a-z][\w.]*)`", PAGES["docs/metrics.md"]):
        parts = re.split("([A-Z]+)", name)  # every second one is in capitals
        patterns.append("".join(r"[\w.]+" if part in PLACEHOLDERS else re.escape(part)
                                for part in parts))
    info = json.loads((PROJECT / "run_0" / "final_info.json").read_text())
    names = {name for entry in info.values() for name in entry["metrics"]}
    for path in (PROJECT / "bench" / "results" / "runs").glob("*.json"):
        names |= set(json.loads(path.read_text())["metrics"])
    undefined = [name for name in names - RETIRED if not name.endswith(RETIRED_ENDINGS)
                 if not any(re.fullmatch(pattern, name) for pattern in patterns)]
    assert not undefined and len(names) > 200


@pytest.mark.parametrize("ablate", [(), ("l1",)])
def test_the_example_variant_and_evaluation_run(tmp_path, ablate):
    texts = write_text_data(tmp_path / "texts.jsonl")
    folder = copy_template(tmp_path / "idea", DATASET=str(texts), ABLATE=ablate)
    edit(folder, SAE_VARIANT="shrunk_topk", EVALS=("core", "l0_spread"))
    for table, name in ((r"SAE_VARIANTS = \{.*?\}", "variant"),
                        (r"EVALUATIONS = \{.*?\)\}", "evaluation")):
        lines = re.search(rf"^{table}\n", SOURCE, flags=re.M | re.S)[0]
        code = example("docs/adding-a-variant.md", name)
        substitute(folder, lines, f"{lines}\n\n{code}")
    finished = run(folder, tmp_path / "cache")
    assert finished.code == 0, finished.tail
    log = next(entry["curves"][0]["training"] for entry in results(folder).values()
               if "training" in entry["curves"][0])
    assert log["stages"] == ["plain", "shrink"] and log["stage_starts"][1] > 0
    assert "l1" in log["losses"] and max(log["losses"]["l1"]) > 0
    spread = results(folder)["l0_spread"]
    assert spread["means"] == {"l0_std_mean": spread["metrics"]["l0_std"]}
    assert spread["metrics"]["l0_std_independent"] > 0
    assert len(spread["per_sequence"][0]["l0_std"]) > 1

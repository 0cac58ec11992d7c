"""The texts that a harness reads, and the runs that the ideas plan."""
import ast
import json
import re
import subprocess

import pytest

from copies import PROJECT

PLANNED = {"temporal": 5, "temporal_context": 10, "compositional": 4, "hierarchical": 5, "temporal_adaptation": 5}
RUN = re.compile(r"^- (\d+)([a-z]?), (.+?): (SAE_VARIANT = .+)$", flags=re.M)
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


def texts():
    return {"prompt": "\n".join(PROMPT.values())} | {idea["Name"]: idea["Experiment"] for idea in IDEAS}


def tracked():
    """Files that a clone has, or will have with the next commit."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=PROJECT,
                            capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: what belongs to the template cannot be told")
    return [name for name in listed.stdout.split("\0") if name and (PROJECT / name).is_file()]

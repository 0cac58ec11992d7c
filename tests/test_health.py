"""The two scripts that agents edit stay fit for it: size, repeats, unread constants, what trips an editor's parser."""
import ast
import re
import subprocess
import sys
from collections import defaultdict

import pytest
from copies import PROJECT

SCRIPTS = ("experiment.py", "plot.py")
MOST_TOKENS, FUNCTION_LINES, LINE_CHARS = 28_000, 60, 120
FLAKE8 = "E9,F821,F823,F831,F406,F407,F701,F702,F704,F706,F401,F811,F841"


def read(name):
    return (PROJECT / name).read_text()


def repeats(texts):
    """Places of runs of three non-blank lines, indentation ignored, that stand twice in all texts {name: text}."""
    places = defaultdict(list)
    for name, text in texts.items():
        lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
        for (i, a), (_, b), (_, c) in zip(lines, lines[1:], lines[2:]):
            places[a, b, c].append(f"{name}:{i}")
    return [where for where in places.values() if len(where) > 1]


def unread_constants(text):
    tree = ast.parse(text)
    stored = {node.id for statement in tree.body if isinstance(statement, (ast.Assign, ast.AnnAssign))
              for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return sorted(name for name in stored - read if name.isupper())


def parser_traps(text):
    """Numbers of lines that an editor of SEARCH/REPLACE blocks takes for its own marks."""
    traps = re.compile(r"\s*([=<>])\1{4,}|\s*\.\.\.\s*$|\s*```")
    return [i for i, line in enumerate(text.splitlines(), 1) if traps.match(line)]


def long_functions(text):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    return [f"{node.name}: {node.end_lineno - node.lineno + 1}" for node in functions
            if node.end_lineno - node.lineno + 1 > FUNCTION_LINES]


def long_lines(text):
    return [i for i, line in enumerate(text.splitlines(), 1) if len(line) > LINE_CHARS]


def star_imports(text):
    return [node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)
            and any(alias.name == "*" for alias in node.names)]


def test_no_three_lines_stand_twice():
    experiment, plot = map(read, SCRIPTS)
    found = repeats({"experiment.py": experiment, "plot.py": plot})
    assert not [where for where in found if any(place.startswith("experiment.py") for place in where)]


def test_every_constant_is_read():
    assert not unread_constants(read("experiment.py"))


@pytest.mark.parametrize("check", [parser_traps, long_functions, long_lines, star_imports], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name, check):
    assert not check(read(name))


def test_size_of_the_experiment():
    size = len(read("experiment.py").encode()) / 3.6
    assert size <= MOST_TOKENS, f"{size:,.0f} tokens: every one of them is paid for in every prompt"


def test_the_checks_see_what_they_look_for():
    lines = "a = 1\n\n    b = 2\nc = 3\n"
    assert repeats({"x": lines, "y": "start\n" + lines.replace("    ", "")}) == [["x:1", "y:2"]]
    assert repeats({"x": lines + lines}) == [["x:1", "x:5"]]
    assert not repeats({"x": lines, "y": lines.replace("c", "d")})
    source = "A, B = 1, 2\nC: int = 3\nD = A\nlower = 4\n\ndef f():\n    E = D\n    return E\n"
    assert unread_constants(source) == ["B", "C"]
    trapped = "=====\n  <<<<<< x\n>>>>>\n    ...\n```python\n"
    assert parser_traps(trapped) == [1, 2, 3, 4, 5]
    assert not parser_traps("a == b\nx = (...)\n<= >=\n====\n# =====\nx[..., 0]\n")
    assert long_functions("def f():\n" + "    x = 1\n" * FUNCTION_LINES) == [f"f: {FUNCTION_LINES + 1}"]
    assert not long_functions("def f():\n" + "    x = 1\n" * (FUNCTION_LINES - 1))
    assert long_lines("x" * LINE_CHARS + "\n" + "x" * (LINE_CHARS + 1)) == [2]
    assert star_imports("import a\nfrom a import b\nfrom a import *\n") == [3]


def flake8(*paths):
    command = [sys.executable, "-m", "flake8", "--isolated", "--select", FLAKE8, *map(str, paths)]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)


def test_flake8(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import os\n\n\ndef f():\n    x = 1\n    return y\n")
    found = flake8(bad)
    assert all(code in found.stdout for code in ("F401", "F821", "F841")), found.stdout + found.stderr
    clean = flake8(*(name for name in (*SCRIPTS, "embedded", "bench", "tests") if (PROJECT / name).exists()))
    assert clean.returncode == 0 and not clean.stdout, clean.stdout + clean.stderr


def test_the_readmes_commands_are_in_the_makefile():
    if not (PROJECT / "README.md").exists():
        pytest.skip("there is no README.md yet")
    named = set(re.findall(r"\bmake ([a-z]\w*)(?= *(?:[A-Z]+=|[#`\n]))", read("README.md")))
    targets = {name for line in re.findall(r"^([a-z][\w ]*):", read("Makefile"), flags=re.M) for name in line.split()}
    assert {"run", "test"} <= named <= targets, (named, targets)

"""The files stay fit for people and agents who edit them: rooms, words, sizes, repeats, and what trips an editor's parser."""
import ast
import re
import subprocess
import sys
from collections import defaultdict

import pytest

from copies import PROJECT

SCRIPTS = ("experiment.py", "plot.py")
# Room or script -> the rooms that it may import
ROOMS = {"experiment": {"data", "runtime", "pages"}, "plot": {"pages", "runtime"}, "data": {"data", "runtime"},
         "runtime": {"runtime"}, "pages": {"pages", "runtime", "data"}}
PRODUCT = (*SCRIPTS, *(str(path.relative_to(PROJECT)) for room in ("data", "runtime", "pages")
                       for path in sorted((PROJECT / room).rglob("*.py"))))
OTHERS = tuple(str(path.relative_to(PROJECT)) for room in ("bench", "embedded") for path in sorted((PROJECT / room).rglob("*.py")))
FUNCTION_LINES, LINE_CHARS, BARE_LINES = 60, 100, 4     # at most; the last of a function without a docstring
FLAKE8 = "E9,F821,F823,F831,F406,F407,F701,F702,F704,F706,F401,F811,F841"   # what aider asks of an edit, and more
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def read(name):
    return (PROJECT / name).read_text()


# ---- The checks: each takes the text of a file and returns what is wrong with it ----
def repeats(texts, n):
    """Returns where runs of n non-blank lines, indentation ignored, stand twice in all texts {name: text}."""
    places = defaultdict(list)
    for name, text in texts.items():
        lines = [(i, line.strip()) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
        for start in range(len(lines) - n + 1):
            run = lines[start:start + n]
            places[tuple(line for _, line in run)].append(f"{name}:{run[0][0]}")
    return [where for where in places.values() if len(where) > 1]


def unread_constants(text):
    tree = ast.parse(text)
    stored = {node.id for statement in tree.body if isinstance(statement, (ast.Assign, ast.AnnAssign))
              for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    loaded = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return sorted(name for name in stored - loaded if name.isupper())


def parser_traps(text):
    """Returns the numbers of lines that an editor of SEARCH/REPLACE blocks takes for its own marks."""
    traps = re.compile(r"\s*([=<>])\1{4,}|\s*\.\.\.\s*$|\s*```")
    return [i for i, line in enumerate(text.splitlines(), 1) if traps.match(line)]


def outer_functions(tree):
    """Returns functions and methods that are not inside another function."""
    found, stack = [], list(tree.body)
    while stack:
        node = stack.pop()
        if isinstance(node, DEFINITIONS):
            found.append(node)
        elif isinstance(node, (ast.ClassDef, ast.If, ast.With)):
            stack += node.body
    return found


def n_lines(node):
    return node.end_lineno - node.lineno + 1


def long_functions(text):
    return [f"{node.name}: {n_lines(node)}" for node in ast.walk(ast.parse(text))
            if isinstance(node, DEFINITIONS) and n_lines(node) > FUNCTION_LINES]


def long_lines(text):
    return [i for i, line in enumerate(text.splitlines(), 1) if len(line) > LINE_CHARS]


def star_imports(text):
    return [node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)
            and any(alias.name == "*" for alias in node.names)]


def changes_of_the_path(text):
    return re.findall(r"sys\.path\.(?:insert|append|extend)|sys\.path\[[^]]*\]\s*\+?=(?!=)|sys\.path\s*\+?=(?!=)", text)


def riddles(text):
    """Returns the functions and classes whose docstring begins with "Of" or "What"."""
    return [f"{node.name}: {node.lineno}" for node in ast.walk(ast.parse(text))
            if isinstance(node, (*DEFINITIONS, ast.ClassDef)) and re.match(r"(Of|What)\b", ast.get_docstring(node) or "")]


def bare_functions(text):
    """Returns the functions of more than BARE_LINES lines that have no docstring."""
    return [f"{node.name}: {node.lineno}" for node in outer_functions(ast.parse(text))
            if not ast.get_docstring(node) and not node.name.startswith("__") and n_lines(node) > BARE_LINES]


def imported(text):
    """Returns the names of the top-level packages that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def names_of(node):
    """Returns the names that an import, a function or a class binds."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return {node.name} if isinstance(node, (*DEFINITIONS, ast.ClassDef)) else set()


def locals_of(function):
    """Returns the names of a function's arguments and of what is bound within it."""
    a = function.args
    arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
    bound = {argument.arg for argument in arguments if argument}
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
        elif node is not function and not isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= names_of(node)
    return bound


def hidden_names(text):
    """Returns the locals that hide a function, a class or an import of their module."""
    tree = ast.parse(text)
    of_module = set().union(*map(names_of, tree.body))
    return [f"{name} in {getattr(node, 'name', 'lambda')}: {node.lineno}" for node in ast.walk(tree)
            if isinstance(node, (*DEFINITIONS, ast.Lambda)) for name in sorted(locals_of(node) & of_module)]


def regions_of(text):
    """Returns the regions in the order in which they are marked, and those in the index that ends the docstring.

    A line of the index begins with a region's name; lines that are indented further carry on with the one above."""
    index = (ast.get_docstring(ast.parse(text)) or "").rstrip().split("\n\n")[-1].splitlines()
    margin = min((len(line) - len(line.lstrip()) for line in index if not line.endswith(":")), default=0)
    entries = [line.strip() for line in index if len(line) - len(line.lstrip()) == margin and not line.endswith(":")]
    return re.findall(r"(?m)^# region (.+?)\s*$", text), entries


# ---- What they say of the files ----
def test_no_three_lines_of_the_scripts_stand_twice():
    found = repeats({name: read(name) for name in SCRIPTS}, 3)
    assert not [where for where in found if any(place.startswith("experiment.py") for place in where)]


def test_no_ten_lines_stand_twice():
    assert not repeats({name: read(name) for name in PRODUCT + OTHERS}, 10)


def test_every_constant_is_read():
    assert not unread_constants(read("experiment.py"))


@pytest.mark.parametrize("check", [long_functions, long_lines, star_imports, changes_of_the_path, riddles, hidden_names],
                         ids=lambda f: f.__name__)
def test_no_file_has(check):
    assert not {name: wrong for name in PRODUCT if (wrong := check(read(name)))}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_hold_nothing_that_an_editor_takes_for_its_marks(name):
    assert not parser_traps(read(name))


def test_functions_of_the_experiment_say_what_they_return():
    assert not bare_functions(read("experiment.py"))


def test_the_index_names_the_regions_in_order():
    text = read("experiment.py")
    regions, entries = regions_of(text)
    assert regions and len(regions) == len(entries), (regions, entries)
    assert all(re.match(rf"{re.escape(region)}\b", entry) for region, entry in zip(regions, entries)), (regions, entries)
    assert len(re.findall(r"(?m)^# endregion\b", text)) == len(regions)


def test_imports_run_one_way():
    for name in PRODUCT:
        room, packages = name.split("/")[0].removesuffix(".py"), imported(read(name))
        assert not packages & set(ROOMS) - ROOMS[room], (name, packages)
        assert room != "data" or "torch" not in packages, name


def test_the_embedded_folder_holds_the_model_alone():
    assert [path.name for path in (PROJECT / "embedded").rglob("*.py")] == ["train_lm.py"]


# ---- That they see what they look for ----
def test_repeats_are_found():
    lines = "a = 1\n\n    b = 2\nc = 3\n"
    assert repeats({"x": lines, "y": "start\n" + lines.replace("    ", "")}, 3) == [["x:1", "y:2"]]
    assert repeats({"x": lines + lines}, 3) == [["x:1", "x:5"]]
    assert not repeats({"x": lines, "y": lines.replace("c", "d")}, 3) and not repeats({"x": lines, "y": lines}, 4)


def test_constants_traps_and_lengths_are_found():
    source = "A, B = 1, 2\nC: int = 3\nD = A\nlower = 4\n\ndef f():\n    E = D\n    return E\n"
    assert unread_constants(source) == ["B", "C"]
    assert parser_traps("=====\n  <<<<<< x\n>>>>>\n    ...\n```python\n") == [1, 2, 3, 4, 5]
    assert not parser_traps("a == b\nx = (...)\n<= >=\n====\n# =====\nx[..., 0]\n")
    assert long_functions("def f():\n" + "    x = 1\n" * FUNCTION_LINES) == [f"f: {FUNCTION_LINES + 1}"]
    assert not long_functions("def f():\n" + "    x = 1\n" * (FUNCTION_LINES - 1))
    assert long_lines("x" * LINE_CHARS + "\n" + "x" * (LINE_CHARS + 1)) == [2]


def test_imports_are_found():
    assert star_imports("import a\nfrom a import b\nfrom a import *\n") == [3]
    assert imported("import a.b, c\nfrom d.e import f\n\ndef g():\n    import h\n") == {"a", "c", "d", "h"}
    for line in ("sys.path.insert(0, x)", "sys.path.append(x)", "sys.path[:0] = [x]", "sys.path += [x]", "sys.path = x"):
        assert changes_of_the_path(f"import sys\n{line}\n")
    assert not changes_of_the_path("if sys.path[0] == x or x in sys.path:\n    pass\n")


def test_docstrings_are_read():
    body = "".join(f"    x = {i}\n" for i in range(BARE_LINES))
    assert riddles('def f():\n    """Of a parent."""\n\nclass A:\n    """What it is."""\n\n    def g(self):\n        """Offers."""\n') \
        == ["f: 1", "A: 4"]
    assert bare_functions(f"def f():\n{body}") == ["f: 1"] and bare_functions(f"class A:\n  def f(self):\n{body}") == ["f: 2"]
    assert not bare_functions(f'def f():\n    """Says it."""\n{body}') and not bare_functions("def f():\n    return 1\n")


def test_hidden_names_are_found():
    module = "import math\nfrom a import b\n\ndef f():\n    pass\n\nclass A:\n    f = 1\n\n"
    for line in ("    f = 1", "    for b in x:\n        pass", "    [A for A in x]", "    with x as math:\n        pass",
                 "    def f():\n        pass", "    return lambda b: b"):
        assert hidden_names(f"{module}def g():\n{line}\n"), line
    assert hidden_names(f"{module}def g(*b):\n    pass\n") == ["b in g: 10"]
    assert not hidden_names(f"{module}def g(x):\n    import math\n    x.f = f(b)\n    return x\n")


def test_regions_are_read():
    doc = '"""A runner.\n\nRegions:\n  config      constants\n  variants    the SAEs,\n                and their base\n"""\n'
    marks = "# region config\n# endregion\n# region variants\n# endregion\n"
    assert regions_of(doc + marks) == (["config", "variants"], ["config      constants", "variants    the SAEs,"])


# ---- Linters, commands ----
def lint(module, *arguments):
    return subprocess.run([sys.executable, "-m", module, *arguments], cwd=PROJECT, capture_output=True, text=True)


@pytest.mark.parametrize("module, options, paths", [
    ("flake8", ("--isolated", "--select", FLAKE8), SCRIPTS), ("pyflakes", (), (*PRODUCT, *OTHERS, "tests"))])
def test_linters(tmp_path, module, options, paths):
    bad = tmp_path / "bad.py"
    bad.write_text("import os\n\n\ndef f():\n    x = 1\n    return y\n")
    found = lint(module, *options, str(bad)).stdout
    assert all(part in found for part in ("'os' imported", "undefined name 'y'", "'x' is assigned")), found
    clean = lint(module, *options, *paths)
    assert clean.returncode == 0 and not clean.stdout, clean.stdout + clean.stderr


def test_the_readmes_commands_are_in_the_makefile():
    named = set(re.findall(r"\bmake ([a-z]\w*)(?= *(?:[A-Z]+=|[#`\n]))", read("README.md")))
    targets = {name for line in re.findall(r"^([a-z][\w ]*):", read("Makefile"), flags=re.M) for name in line.split()}
    assert {"run", "test"} <= named <= targets, (named, targets)

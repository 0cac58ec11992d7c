"""Labels of Python source, character by character."""
import ast
import io
import keyword
import re
import subprocess
import sys
import time
import tokenize

import numpy as np
import pytest

from copies import PROJECT
from data.code_labels import char_labels, LABELS
from data.documents import embedded_documents


def check_labels(text, expected):
    """expected: "before|part|after", which occurs once in the text -> the token_type of every character of the part
    and then the contexts it is inside of."""
    labels = char_labels(text)
    assert labels.shape == (len(text), len(LABELS)) and labels.dtype == np.int8
    for place, words in expected.items():
        before, part, after = place.split("|")
        whole = before + part + after
        assert text.count(whole) == 1, place
        start = text.index(whole) + len(before)
        token_type, *inside = words.split()
        row = [LABELS["token_type"].index(token_type)]
        row += [int(context in inside) for context in list(LABELS)[1:]]
        assert labels[start:start + len(part)].tolist() == [row] * len(part), place


def test_names_of_labels():
    assert list(LABELS) == ["token_type", "docstring", "class", "function", "call"]
    assert all(classes == ("outside", "inside") for classes in list(LABELS.values())[1:])


def test_labels_of_types_and_bodies():
    check_labels("""# before
'''Module's
docs.'''
import os

class Outer(Base, metaclass=Meta):  # why
    "Class docs."
    size: int = 0x1f + 1_000.5e3j

    @decorate(7, by="name")
    @(other)
    async def method(self, x=first(), *, y: int = -1) -> bool:

        # a comment before the docstring
        "method" " docs"
        class Inner:
            def deep(self): return lambda a: a  # noqa

            held = 2
        "not docs"
        if x is not None and x != y \\
                or await x:
            return [print(x), b"bytes"]     # at the end
    # after the method
    last = True

def plain(): pass
tail = ...
""", {
        "|# before|": "comment", "before|\n|": "whitespace", "|'''Module's\ndocs.'''|": "docstring docstring",
        "|import| os": "keyword", "import| |os": "whitespace", "|os|\n": "name",
        "|class| Outer": "keyword", "|Outer|": "name", "Outer|(|": "operator", "metaclass|=|": "operator",
        "Meta|)|:": "operator", "Meta)|:|": "operator", "Meta):|  |": "whitespace class", "|# why|": "comment class",
        "why|\n    |": "whitespace class", '|"Class docs."|': "docstring docstring class", "|size|": "name class",
        "size|:|": "operator class", "|0x1f|": "number class", "|1_000.5e3j|": "number class",
        "|@|decorate": "operator class", "@|decorate|(": "name class", "decorate|(|7": "operator class call",
        "|7|, by": "number class call", "7,| |by": "whitespace class call", '|"name"|': "string class call",
        '"name"|)|': "operator class call", "(|other|)": "name class",
        "|async| def": "keyword class", "async |def| m": "keyword class",
        "|method|(self": "name class", "(|self|, x": "name class",
        "|first|()": "name class", "first|()|": "operator class call", "first()|,|": "operator class",
        "-> |bool|": "name class", "bool|:|": "operator class",
        "bool:|\n\n        |# a": "whitespace class function",
        "|# a comment before the docstring|": "comment class function",
        '|"method"| ': "docstring docstring class function", '"method"| |': "whitespace docstring class function",
        '|" docs"|': "docstring docstring class function", '" docs"|\n        |class': "whitespace class function",
        "|Inner|": "name class function", "|def| deep": "keyword class function", "deep(|self|": "name class function",
        "|return| lambda": "keyword class function", "|lambda|": "keyword class function",
        "|# noqa|": "comment class function", "|held|": "name class function",
        '|"not docs"|': "string class function", "x |is| not": "keyword class function",
        "|None|": "keyword class function", "|!=|": "operator class function", 
        "y| \\\n                |or": "whitespace class function",
        "|await|": "keyword class function", "[|print|": "name class function",
        "print|(|": "operator class function call", "print(|x|": "name class function call",
        "print(x|)|": "operator class function call", '|b"bytes"|': "string class function",
        "|# at the end|": "comment class function", "|# after the method|": "comment class", "|last|": "name class",
        "|True|": "keyword class", "True|\n\n|def": "whitespace", "def |plain|": "name", "plain|()|": "operator",
        "plain()|:|": "operator", "plain():| |": "whitespace function", "|pass|": "keyword function",
        "pass|\n|": "whitespace", "|tail|": "name", "|...|": "operator"})


def test_labels_of_calls():
    check_labels("""value = one(two(
    3,  # three
    [four for five in six(7)],
), **{"k": (8, eight)})(nine).ten(
)[eleven]((12))
(thirteen)(14)
print, (fifteen)
@decorate
class C(call(16), key=17): pass
del(x)
""", {
        "value = |one|": "name", "one|(|two": "operator call", "|two|": "name call", "|# three|": "comment call",
        "[|four|": "name call", "in |six|": "name call", "|eight|": "name call", "})|(|nine": "operator call",
        "|nine|": "name call", "nine)|.|ten": "operator", "|ten|": "name",
        "ten|(|": "operator call", "ten(|\n|)": "whitespace call",
        "[|eleven|": "name", "]|((|12": "operator call", "12|))|": "operator call", "|(|thirteen": "operator",
        "|thirteen|": "name", "thirteen|)|(14": "operator", "(|14|": "number call", "|fifteen|": "name",
        "@|decorate|": "name", "C|(|call": "operator", "|call|": "name", "|16|": "number call", "key=|17|": "number",
        "del|(|x": "operator", "del(|x|": "name"})


def test_labels_after_characters_of_many_bytes():
    """ast counts bytes, tokenize characters."""
    check_labels("""äöü = '日本'; run('é', 日本)  # ü
class Ä: 'ß'; x = '🙂'; y = f(1)
def é(): 'dóc'; return "à" + g(2)
def multi(): '''ö
ü'''; é(3)
text = \"\"\"ä
🙂\"\"\"; x = (4)
col·lecció = 5
""", {
        "|äöü|": "name", "|'日本'|": "string", "|run|": "name", "run|(|": "operator call",
        "('é', |日本|": "name call",
        "日本|)|": "operator call", ")|  |# ü": "whitespace", "|# ü|": "comment", "|Ä|": "name",
        "Ä:| |": "whitespace class", "|'ß'|": "docstring docstring class", "'ß'|;|": "operator class",
        "|'🙂'|": "string class", "|f|(1": "name class", "f(|1|)": "number class call",
        "f(1|)|": "operator class call",
        "|é|():": "name", "é|()|:": "operator", "|'dóc'|": "docstring docstring function",
        "'dóc'|;|": "operator function", "|g|(2": "name function", "(|2|)": "number function call",
        "2)|\n|": "whitespace", "|'''ö\nü'''|": "docstring docstring function",
        "ü'''|;|": "operator function", "(|3|)": "number function call", '|"""ä\n🙂"""|; x': "string",
        '"""|;| x = (': "operator", "|(|4": "operator", "|4|": "number", "|col·lecció|": "name"})


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_labels_after_characters_that_end_lines_elsewhere(newline):
    """Form feeds, vertical tabs and others end lines for str.splitlines, not for Python."""
    text = ('x = 1\n\f\n# a\x0bb\x1cc\u2028d\x85e\ndef f():\f\n\f    "doc\x0c \u2029"\n    y = """\n\x1d\n"""; g(2)\n'
            '\fclass C:\n    z = 3\n').replace("\n", newline)
    check_labels(text, {
        "|x| =": "name", "1|" + newline + "\f" + newline + "|#": "whitespace", "|# a\x0bb\x1cc\u2028d\x85e|": "comment",
        "():|\f|": "whitespace function", '|"doc\x0c \u2029"|': "docstring docstring function",
        '|"""' + newline + "\x1d" + newline + '"""|;': "string function", "|g|(2": "name function",
        "g(|2|)": "number function call", "2)|" + newline + "\f|class": "whitespace", "|class| C": "keyword",
        "C:|" + newline + "    |z": "whitespace class", "|3|": "number class", "3|" + newline + "|": "whitespace"})


def test_f_strings_are_strings_from_end_to_end():
    """Whether Python makes one token of them or, from 3.12 on, many."""
    check_labels("""def f(x):
    f"no docs {x}"
    a = f"{x!r:>{width(1)}} {{braces}} {run(x, 'y')}" + rf'''{
        f"{x}" if x else (lambda: 3)}
    é {x}''' "more" f'{x=}'
    return call(f"{g(x)}é{x}" f"{x}", 4)
b = "doc" f"{1}"
""", {
        "|f\"no docs {x}\"|": "string function", "|f\"{x!r:>{width(1)}} {{braces}} {run(x, 'y')}\"|": "string function",
        "|rf'''{\n        f\"{x}\" if x else (lambda: 3)}\n    é {x}'''|": "string function",
        "'''| |\"more\"": "whitespace function", "|\"more\"|": "string function", "|f'{x=}'|": "string function",
        "|call|": "name function", "|f\"{g(x)}é{x}\"|": "string function call", "\"|,| 4": "operator function call",
        "|4|": "number function call", "\"doc\"| |": "whitespace", "|f\"{1}\"|": "string"})


@pytest.mark.parametrize("text, docstring", [
    ('def f():\n    x = 1\n    "second"\n', None),
    ('x = 1\n"second"\n', None),
    ('class A:\n    b"bytes"\n', None),
    ('class A:\n    f"formatted"\n', None),
    ('class A:\n    "a" + "b"\n', None),
    ('if x:\n    "of an if"\n', None),
    ('x = lambda: "of a lambda"\n', None),
    ('# first\n\n("in parentheses")\n', '"in parentheses"'),
    ('class A: "one line"; x = "other"', '"one line"'),
    ('async def f():\n    r"""raw\n    \\d"""', 'r"""raw\n    \\d"""'),
    ('def f():\n    ""\n', '""'),
    ('"a" \\\n"b"\n', '"a" \\\n"b"'),
])
def test_labels_of_docstrings(text, docstring):
    labels = char_labels(text)
    inside = "".join(c for c, row in zip(text, labels) if row[list(LABELS).index("docstring")])
    assert inside == (docstring or "")
    of_type = labels[:, 0] == LABELS["token_type"].index("docstring")
    assert "".join(c for c, is_docstring in zip(text, of_type) if is_docstring) == inside.replace(" \\\n", "")


@pytest.mark.parametrize("text", [
    "The cat sat on the mat.", "print 'two'", "def f(:\n", "x = 'open\n", "x = (", "  indented\nx", "x = 1\n\0",
    "x = '\ud800'", "f(" * 500 + ")" * 500, "-" * 200_000 + "1", " = Title = \n\n Text .\n", "\\begin{document}",
    '{"text": "a\n"}', "x\n\ty\n", "[" * 90, "{" * 90, "(" * 60 + "a" + "}" * 60])
def test_what_is_not_python_has_no_labels(text):
    began = time.monotonic()
    assert char_labels(text) is None
    assert time.monotonic() - began < 5


def test_labels_of_next_to_nothing():
    assert char_labels("").shape == (0, len(LABELS))
    assert char_labels(" \n\n").tolist() == [[0] * len(LABELS)] * 3
    assert char_labels("x").shape == char_labels("#").shape == (1, len(LABELS))


def test_labelling_is_quiet():
    """Also where the source has invalid escapes and the like, and where Python is asked for every warning."""
    code = "from data.code_labels import char_labels; " \
           "print(char_labels(r\"x = '\\d' is 1if 2else 3\" + \"\\nassert (1, 'x')\\n\").shape)"
    for flags in ([], ["-W", "always"]):
        done = subprocess.run([sys.executable, *flags, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=180)
        assert (done.returncode, done.stderr, done.stdout) == (0, "", "(40, 5)\n")


def test_labels_of_real_files():
    """Against other ways to count the same: tokenize's own strings, ast.get_docstring, the lines of functions."""
    documents = sorted((d for d in embedded_documents() if d.heldout), key=lambda d: d.name[::-1])[::15]
    assert len(documents) >= 28
    names = list(LABELS)
    for document in documents:
        text, labels = document.text, char_labels(document.text)
        types = np.array(LABELS["token_type"])[labels[:, 0]]
        inside = {name: labels[:, names.index(name)] == 1 for name in names[1:]}
        assert set(np.unique(labels[:, 1:])) <= {0, 1}

        def parts(mask):
            edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
            return [text[a:b] for a, b in edges.reshape(-1, 2)]

        assert all(keyword.iskeyword(part) for part in parts(types == "keyword"))
        assert all(part.isidentifier() and not keyword.iskeyword(part) for part in parts(types == "name"))
        assert all(part.startswith("#") and "\n" not in part for part in parts(types == "comment"))
        assert all(re.fullmatch(r"[\s\\]+", part) for part in parts(types == "whitespace"))
        assert all(part[0] in "0123456789." for part in parts(types == "number"))
        assert not any(re.search(r"[\w\s\"'#]", part) for part in parts(types == "operator"))
        assert not (inside["docstring"] & (types == "string")).any()
        assert inside["docstring"][types == "docstring"].all()

        tree = ast.parse(text)
        have = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = [node for node in ast.walk(tree) if isinstance(node, have)]
        found = [ast.get_docstring(node, clean=False) for node in nodes]
        assert len(parts(inside["docstring"])) == sum(docstring is not None for docstring in found)
        assert sorted(ast.literal_eval(f"({part})") for part in parts(inside["docstring"])) == \
            sorted(docstring for docstring in found if docstring is not None)
        assert sum(map(len, parts(types == "comment"))) == sum(
            len(token.string) for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type == tokenize.COMMENT)

        line_starts = np.cumsum([0] + [len(line) + 1 for line in text.split("\n")])
        for name, kinds in (("class", ast.ClassDef), ("function", (ast.FunctionDef, ast.AsyncFunctionDef))):
            bodies = [range(node.body[0].lineno, node.end_lineno + 1) for node in nodes if isinstance(node, kinds)]
            lines = set().union(*bodies)
            of_line = {n + 1: inside[name][start:end - 1][-1:].any()
                       for n, (start, end) in enumerate(zip(line_starts, line_starts[1:])) if end - start > 1}
            assert all(of_line[n] for n in lines if n in of_line)
        assert parts(types == "keyword").count("class") == sum(isinstance(node, ast.ClassDef) for node in nodes)

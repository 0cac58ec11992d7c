"""Labels of the characters of Python source: what each is part of."""
import ast
import io
import keyword
import re
import tokenize
import warnings
from bisect import bisect_left, bisect_right
from typing import NamedTuple

import numpy as np

# Label -> its classes. token_type is syntax: what a character is part of; an f-string is string
# from end to end, a backslash that joins lines is whitespace. The others are context, which may
# have begun far above. A docstring includes its quotes, a call is from "(" to ")", a body from the
# colon before it to the end of its last line.
LABELS = {
    "token_type": ("whitespace", "comment", "string", "docstring", "keyword", "operator", "number",
                   "name"),
    "docstring": ("outside", "inside"),
    "class": ("outside", "inside"),
    "function": ("outside", "inside"),
    "call": ("outside", "inside"),
}
# ERRORTOKEN: before Python 3.12 the letters that belong to names and are not in the re module's \w.
TOKEN_TYPES = {tokenize.COMMENT: "comment", tokenize.STRING: "string", tokenize.OP: "operator",
               tokenize.NUMBER: "number", tokenize.NAME: "name", tokenize.ERRORTOKEN: "name"}
TYPE_IDS = {name: i for i, name in enumerate(LABELS["token_type"])}
# From Python 3.12 on f-strings are tokens too, from 3.14 on t-strings, which contain the tokens of
# their expressions.
QUOTES_BEGIN = {getattr(tokenize, name, None) for name in ("FSTRING_START", "TSTRING_START")}
QUOTES_END = {getattr(tokenize, name, None) for name in ("FSTRING_END", "TSTRING_END")}
FORMATTED = (ast.JoinedStr, getattr(ast, "TemplateStr", ast.JoinedStr))
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class TokenPlaces(NamedTuple):
    """Places of characters in a source, as its tokens tell."""
    colons: list  # after each colon, ascending
    line_ends: list  # where each logical line ends, ascending
    parentheses: dict  # after a ")" -> its "("


def char_labels(text: str) -> np.ndarray | None:
    """Returns the class of each character for each of LABELS, [len(text), len(LABELS)] int8; None
    where the text is not Python.

    Expressions in f-strings count as text: before Python 3.12 their places are not known.
    """
    # The parser ends lines at \n, \r\n and \r, tokenize not at \r, str.splitlines at others too.
    source = re.sub("\r\n?", "\n", text) + "\n"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes
            labels = _source_labels(source, ast.parse(source))
    except Exception:  # a syntax error, a zero byte, a lone surrogate, too deep nesting, ...
        return None

    steps = np.ones(len(text), int)
    second = [match.start() + 1 for match in re.finditer("\r\n", text)]
    steps[second] = 0  # \r\n is one character of source
    return labels[steps.cumsum() - 1]


def _source_labels(source, tree):
    """Returns the labels of a source's characters, [len(source), len(LABELS)] int8."""
    lines = source.split("\n")
    starts = np.cumsum([0, 0] + [len(line) + 1 for line in lines]).tolist()  # of lines 1, 2, ...
    labels = np.zeros((len(source), len(LABELS)), np.int8)
    types, docstring = labels[:, 0], labels[:, 1]
    places = _label_tokens(source, starts, types)

    def place(line, column):
        """Returns the character at a line and a column in bytes, as ast counts."""
        return starts[line] + len(lines[line - 1].encode()[:column].decode())

    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if not isinstance(node, FORMATTED):
            nodes.extend(ast.iter_child_nodes(node))
            _label_node(node, place, places, labels)
    types[(docstring == 1) & (types == TYPE_IDS["string"])] = TYPE_IDS["docstring"]
    return labels


def _label_tokens(source, starts, types):
    """Sets `types` [len(source)] to the class of each character's token; returns TokenPlaces."""
    colons, line_ends, parentheses, opened, quotes, quotes_start = [], [], {}, [], 0, 0
    for kind, string, position, _, _ in tokenize.generate_tokens(io.StringIO(source).readline):
        start = starts[position[0]] + position[1]
        end = start + len(string)  # tokenize's own is wrong after some strings early in 3.12
        if kind in QUOTES_BEGIN:
            quotes_start = quotes_start if quotes else start
            quotes += 1
        elif kind in QUOTES_END:
            quotes -= 1
            types[quotes_start:end] = TYPE_IDS["string"]
        elif kind == tokenize.NEWLINE:
            line_ends.append(start)
        elif kind in TOKEN_TYPES and not quotes and not string.isspace():
            name = "keyword" if keyword.iskeyword(string) else TOKEN_TYPES[kind]
            types[start:end] = TYPE_IDS[name]
            if string == "(":
                opened.append(start)
            elif string == ")":
                parentheses[end] = opened.pop()
            elif string == ":":
                colons.append(end)
    return TokenPlaces(colons, line_ends, parentheses)


def _label_node(node, place, places, labels):
    """Marks in `labels` the docstring, body or arguments of a call that a syntax tree's node is."""
    _, docstring, in_class, in_function, call = labels.T
    if isinstance(node, ast.Call):
        end = place(node.end_lineno, node.end_col_offset)
        call[places.parentheses[end]:end] = 1
    elif isinstance(node, (ast.ClassDef, *FUNCTIONS)):
        first = (getattr(node.body[0], "decorator_list", None) or node.body)[0]
        before = bisect_right(places.colons, place(first.lineno, first.col_offset)) - 1
        last = bisect_left(places.line_ends, place(node.end_lineno, node.end_col_offset))
        body = slice(places.colons[before], places.line_ends[last])
        (in_class if isinstance(node, ast.ClassDef) else in_function)[body] = 1

    documented = isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS))
    if documented and ast.get_docstring(node, clean=False) is not None:
        text = node.body[0].value
        start = place(text.lineno, text.col_offset)
        docstring[start:place(text.end_lineno, text.end_col_offset)] = 1


def first_character(text, start, end):
    """Returns the place of the character whose labels are those of the token at [start, end).

    Some tokenizers leave spaces out of a token's place: then that of spaces alone is empty and lies
    after them.
    """
    if start == end and text[max(0, start - 1):start].isspace():
        start -= 1
    blank = end - start - len(text[start:end].lstrip())
    return min(start + blank if start + blank < end else start, len(text) - 1)

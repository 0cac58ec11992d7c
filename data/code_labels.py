"""Labels of the characters of Python source: what each is part of."""
import ast
import io
import keyword
import re
import tokenize
import warnings
from bisect import bisect_left, bisect_right

import numpy as np



# Label -> its classes. Syntax: token_type, what a character is part of; an f-string is string from end to end, a
# backslash that joins lines is whitespace. Context, which may have begun far above: all the others. A docstring
# includes its quotes, a call is from "(" to ")", a body from the colon before it to the end of its last line.
LABELS = {
    "token_type": ("whitespace", "comment", "string", "docstring", "keyword", "operator", "number", "name"),
    "docstring": ("outside", "inside"),
    "class": ("outside", "inside"),
    "function": ("outside", "inside"),
    "call": ("outside", "inside"),
}
# ERRORTOKEN: before Python 3.12 the letters that belong to names and are not in the re module's \w.
TOKEN_TYPES = {tokenize.COMMENT: "comment", tokenize.STRING: "string", tokenize.OP: "operator",
               tokenize.NUMBER: "number", tokenize.NAME: "name", tokenize.ERRORTOKEN: "name"}
# From Python 3.12 on f-strings are tokens too, from 3.14 on t-strings, which contain their expressions' tokens.
QUOTES_BEGIN = {getattr(tokenize, name, None) for name in ("FSTRING_START", "TSTRING_START")}
QUOTES_END = {getattr(tokenize, name, None) for name in ("FSTRING_END", "TSTRING_END")}
FORMATTED = (ast.JoinedStr, getattr(ast, "TemplateStr", ast.JoinedStr))


def char_labels(text: str) -> np.ndarray | None:
    """Class of each character for each of LABELS, [len(text), len(LABELS)] int8; None where the text is not Python.

    Expressions in f-strings count as text: before Python 3.12 their places are not known.
    """
    # The parser ends lines at \n, \r\n and \r, tokenize not at \r, str.splitlines at form feeds and others too.
    source = re.sub("\r\n?", "\n", text) + "\n"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")          # of invalid escapes
            labels = _source_labels(source, ast.parse(source))
    except Exception:            # a syntax error, a zero byte, a lone surrogate, too deep nesting, ...
        return None
    steps = np.ones(len(text), int)
    steps[[match.start() + 1 for match in re.finditer("\r\n", text)]] = 0         # \r\n is one character of source
    return labels[steps.cumsum() - 1]


def _source_labels(source, tree):
    lines = source.split("\n")
    begins = np.cumsum([0, 0] + [len(line) + 1 for line in lines]).tolist()        # where line n = 1, 2, ... begins
    labels = np.zeros((len(source), len(LABELS)), np.int8)
    types, docstring, in_class, in_function, call = labels.T
    type_ids = {name: i for i, name in enumerate(LABELS["token_type"])}
    colons, line_ends, parentheses, opened, quotes, quotes_start = [], [], {}, [], 0, 0
    for kind, string, (line, column), _, _ in tokenize.generate_tokens(io.StringIO(source).readline):
        start = begins[line] + column
        end = start + len(string)        # tokenize's own end is wrong after some strings in early versions of 3.12
        if kind in QUOTES_BEGIN:
            quotes_start = quotes_start if quotes else start
            quotes += 1
        elif kind in QUOTES_END:
            quotes -= 1
            types[quotes_start:end] = type_ids["string"]
        elif kind == tokenize.NEWLINE:
            line_ends.append(start)
        elif kind in TOKEN_TYPES and not quotes and not string.isspace():
            types[start:end] = type_ids["keyword" if keyword.iskeyword(string) else TOKEN_TYPES[kind]]
            if string == "(":
                opened.append(start)
            elif string == ")":
                parentheses[end] = opened.pop()
            elif string == ":":
                colons.append(end)

    def place(line, column):
        """The character at a line and a column in bytes, as ast counts."""
        return begins[line] + len(lines[line - 1].encode()[:column].decode())

    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, FORMATTED):
            continue
        nodes.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Call):
            end = place(node.end_lineno, node.end_col_offset)
            call[parentheses[end]:end] = 1
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = (getattr(node.body[0], "decorator_list", None) or node.body)[0]
            start = colons[bisect_right(colons, place(first.lineno, first.col_offset)) - 1]
            end = line_ends[bisect_left(line_ends, place(node.end_lineno, node.end_col_offset))]
            (in_class if isinstance(node, ast.ClassDef) else in_function)[start:end] = 1
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) \
                and ast.get_docstring(node, clean=False) is not None:
            found = node.body[0].value
            start, end = place(found.lineno, found.col_offset), place(found.end_lineno, found.end_col_offset)
            docstring[start:end] = 1
    types[(docstring == 1) & (types == type_ids["string"])] = type_ids["docstring"]
    return labels


def first_character(text, start, end):
    """Where in the text the token at [start, end) has the character that its labels are those of.

    Some tokenizers leave spaces out of a token's place: then that of spaces alone is empty and lies after them."""
    if start == end and text[max(0, start - 1):start].isspace():
        start -= 1
    blank = end - start - len(text[start:end].lstrip())
    return min(start + blank if start + blank < end else start, len(text) - 1)

"""Keys of the code that makes a value, and the sources that a run's folder keeps."""
import ast
import functools
import gc
import hashlib
import importlib
import inspect
import sys
import zipfile
from pathlib import Path
from types import FunctionType, ModuleType

ROOT = Path(__file__).absolute().parent.parent  # not resolved: a copy's rooms may be links
ROOMS = ("data", "runtime", "pages")
PLAIN = (str, int, float, bool, type(None))


def code_key(*parts):
    """Returns a key (20 hexadecimal digits) of the code of functions and classes, and of values.

    A function or class counts with every function, class and constant of the project's own files
    that it names, and that those name; of runtime/ only sparse_ops.py counts, as the rest never
    changes a value. Comments, docstrings, `print` statements and what `raise` and `assert` say do
    not count, nor does a table of classes. A constant that is a number, a text or a tuple of these
    counts by its present value. What a function defines inside itself counts by the whole function.
    Other parts count by their repr, containers by what they hold. Raises ValueError where a repr
    differs between processes.
    """
    given, definitions = [], []
    for part in members_of(parts):
        part = inspect.unwrap(getattr(part, "__func__", part)) if callable(part) else part
        if isinstance(part, (FunctionType, type)):
            namespace = namespace_of(part)
            definitions += [(namespace, node) for node in definitions_of(part, namespace)]
        elif " at 0x" in repr(part):
            raise ValueError(f"{repr(part)[:200]} has no repr that is the same in every process")
        given.append(getattr(part, "__qualname__", None) or repr(part))
    return digest(*given, *sorted(reached_texts(definitions)))


def sources_key(script):
    """Returns a key (20 hexadecimal digits) of the texts of a script and of its rooms."""
    return digest(script, *sum(source_files().items(), ()))


def write_sources(folder, script):
    """Writes the text `script` as experiment.py into a folder, and the rooms as sources.zip, which
    has the same bytes wherever the texts are the same."""
    (folder / "experiment.py").write_text(script, encoding="utf-8")
    with zipfile.ZipFile(folder / "sources.zip", "w") as archive:
        for name, text in source_files().items():
            archive.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)


def source_files():
    """Returns {path from the project's folder: text} of the .py and .html files of its rooms."""
    kinds = [(room, kind) for room in ROOMS for kind in ("*.py", "*.html")]
    paths = [path for room, kind in kinds for path in (ROOT / room).rglob(kind)]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
            for path in sorted(paths)}


def digest(*texts):
    """Returns 20 hexadecimal digits of the SHA-256 of texts."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:20]


# ---- Parts of a key ----
def members_of(part):
    """Yields the members of tuples, lists, dictionaries and functools.partial, of each after its
    kind and size; anything else as it is."""
    if isinstance(part, functools.partial):
        part = ("partial", part.func, part.args, part.keywords)
    if not isinstance(part, (tuple, list, dict)):
        yield part
        return

    yield f"{type(part).__name__} of {len(part)}"
    for member in part.items() if isinstance(part, dict) else part:
        yield from members_of(member)


def namespace_of(part):
    """Returns the globals of the module that defines a function or class, however it was loaded."""
    if isinstance(part, FunctionType):
        return part.__globals__
    for member in vars(part).values():
        function = getattr(member, "__func__", member)  # of a static or class method
        if isinstance(function, FunctionType) and function.__module__ == part.__module__:
            return function.__globals__
    return vars(sys.modules[part.__module__])


def definitions_of(part, namespace):
    """Returns the syntax trees of a function or class; of a lambda those of all in its line."""
    tree, bindings = parsed(namespace["__file__"])
    if "<lambda>" in part.__qualname__:
        line = part.__code__.co_firstlineno
        return [n for n in ast.walk(tree) if isinstance(n, ast.Lambda) and n.lineno == line]

    first, *inner = part.__qualname__.split(".<locals>")[0].split(".")
    nodes = bindings[first]
    for name in inner:
        nodes = [n for node in nodes for n in node.body if getattr(n, "name", None) == name]
    return nodes


# ---- What code names ----
def reached_texts(definitions):
    """Returns the set of texts of [(globals, syntax tree)] and of all that these name."""
    texts, seen, todo = set(), set(), list(definitions)
    scripts = {namespace["__file__"] for namespace, _ in definitions}
    while todo:
        namespace, node = todo.pop()
        text, names = content(node)
        texts.add(text)
        for module, path in names if node not in seen else ():
            start = vars(importlib.import_module(module)) if module else namespace
            home, name, value = resolve(start, path, scripts)
            if not counts(home, scripts) or name.startswith("__"):  # __file__ differs in a copy
                continue
            if is_plain(value):
                texts.add(f"{name} = {value!r}")
            elif not is_table_of_classes(value):
                todo += [(home, found) for found in parsed(home["__file__"])[1].get(name, ())]
        seen.add(node)
    return texts


@functools.cache
def parsed(file):
    """Returns a file's syntax tree and {name: the top-level statements that bind it}."""
    collecting, bindings = gc.isenabled(), {}
    gc.disable()  # it would visit all objects of torch many times while the tree grows
    tree = ast.parse(Path(file).read_bytes())
    if collecting:
        gc.enable()

    for statement in tree.body:
        if hasattr(statement, "name"):
            names = [statement.name]
        elif isinstance(statement, ast.ImportFrom):
            names = [alias.asname or alias.name for alias in statement.names]
        else:
            stored = [n for n in ast.walk(statement) if isinstance(n, ast.Name)]
            names = {n.id for n in stored if isinstance(n.ctx, ast.Store)}
        for name in names:
            bindings.setdefault(name, []).append(statement)
    return tree, bindings


@functools.cache
def content(node):
    """Returns a syntax tree as text, without what does not count, and the set of what it names:
    (None, ("name", "attribute", ...)), or (module, ("name",)) where a function imports from a room.
    """
    text, names, todo = [], set(), [node]
    while todo:
        part = todo.pop()
        if isinstance(part, list):
            part = [member for member in part if not is_remark(member)]
            text.append(str(len(part)))
            todo += reversed(part)
            continue

        text.append(type(part).__name__ if isinstance(part, ast.AST) else repr(part))
        if isinstance(part, (ast.Name, ast.Attribute)) and (path := dotted(part)):
            names.add((None, path))
        elif isinstance(part, ast.ImportFrom) and (part.module or "").split(".")[0] in ROOMS:
            names |= {(part.module, (alias.name,)) for alias in part.names}
        messages = {ast.Raise: {"exc", "cause"}, ast.Assert: {"msg"}}.get(type(part), {"ctx"})
        fields = [field for field in getattr(part, "_fields", ()) if field not in messages]
        todo += [getattr(part, field, None) for field in reversed(fields)]
    return " ".join(text), names


def is_remark(statement):
    """Returns whether a statement is a docstring or a call of print."""
    value = statement.value if isinstance(statement, ast.Expr) else None
    if isinstance(value, ast.Call):
        return getattr(value.func, "id", "") == "print"
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def dotted(node):
    """Returns the names of `a.b.c` as a tuple; () where it does not begin with a name."""
    if isinstance(node, ast.Attribute):
        return (*start, node.attr) if (start := dotted(node.value)) else ()
    return (node.id,) if isinstance(node, ast.Name) else ()


def is_table_of_classes(value):
    """Returns whether a value is a dict of classes, of which a run uses one: its key is given that
    one besides."""
    return isinstance(value, dict) and all(isinstance(part, type) for part in value.values())


def resolve(namespace, path, scripts):
    """Returns the globals that define what a dotted name means in a namespace, its name there, and
    its value; modules and `from ... import` are followed."""
    name, value = path[0], namespace.get(path[0])
    for attribute in path[1:]:
        if not isinstance(value, ModuleType):
            break
        namespace, name, value = vars(value), attribute, vars(value).get(attribute)
    if not counts(namespace, scripts):
        return namespace, name, value

    for statement in parsed(namespace["__file__"])[1].get(name, ()):
        if isinstance(statement, ast.ImportFrom) and statement.module in sys.modules:
            original = next(a.name for a in statement.names if (a.asname or a.name) == name)
            home, name, _ = resolve(vars(sys.modules[statement.module]), (original,), scripts)
            return home, name, value
    return namespace, name, value


def counts(namespace, scripts):
    """Returns whether what a module defines counts: its file is one of `scripts` or is_own."""
    file = namespace.get("__file__") or ""
    return file in scripts or is_own(file)


@functools.cache
def is_own(file):
    """Returns whether a file lies beside runtime/ or in a folder beside it; of runtime/'s own only
    sparse_ops.py."""
    path, runtime = Path(file).absolute(), Path(__file__).resolve().parent
    beside = [(folder / "runtime").resolve() for folder in (path.parent, path.parent.parent)]
    plumbing = path.parent.name == "runtime" and path.stem != "sparse_ops"
    return runtime in beside and path.suffix == ".py" and not plumbing


def is_plain(value):
    """Returns whether a value is a number, a text, True, False, None or a tuple of these."""
    return isinstance(value, PLAIN) or type(value) is tuple and all(map(is_plain, value))

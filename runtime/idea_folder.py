"""Makes ready the folder in which `make run` trains a variant: a copy of the template.

    python -m runtime.idea_folder [--variant NAME] [--idea NAME]    from the template's folder
    python -m runtime.idea_folder --list                            the variants' names

Prints the folder's path; on stderr, what it did. Nothing but Python is needed, so that a wrong name
ends before anything is installed.
"""
import argparse
import ast
import filecmp
import itertools
import re
import shutil
import sys
from pathlib import Path

FLAGSHIP = "slow"  # what is trained where nobody names a variant
UNCHANGED = "standard"  # SAE_VARIANT in experiment.py as it comes
FILES = ("experiment.py", "plot.py", "notes.txt", "requirements.txt")
FOLDERS = ("data", "runtime", "pages", "embedded")
REFERENCES = ("run_0", "run_batch_topk")  # finished runs that plot.py compares with
SETTING = re.compile(r'^SAE_VARIANT = "([^"\n]*)"', re.MULTILINE)


def say(text):
    """Prints a line on stderr: stdout is for the folder alone."""
    print(text, file=sys.stderr)


def refuse(text):
    """Ends with a line on stderr; nothing was written."""
    sys.exit(f"make: {text}")


def variants_of(source):
    """Returns the names in SAE_VARIANTS of a text of experiment.py; none where they cannot be
    read."""
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        refuse(f"experiment.py, line {error.lineno}: {error.msg}")
    for statement in statements:
        names = [ast.unparse(target) for target in getattr(statement, "targets", ())]
        if "SAE_VARIANTS" in names and isinstance(statement.value, ast.Dict):
            return [key.value for key in statement.value.keys if isinstance(key, ast.Constant)]
    return []


def chosen_variant(source, wanted):
    """Returns the variant to train: the one `wanted`, or else the one that experiment.py has been
    set to, or else the flagship."""
    found = SETTING.search(source)
    if not found:
        refuse('experiment.py has no line that begins with SAE_VARIANT = "..."')
    changed = found[1] if found[1] != UNCHANGED else None
    variant, known = wanted or changed or FLAGSHIP, variants_of(source)
    if known and variant not in known:
        refuse(f"VARIANT={variant} is none of {', '.join(known)}")
    if changed and variant != changed:
        say(f'experiment.py has SAE_VARIANT = "{changed}"; the copy has "{variant}", as VARIANT '
            "says")
    elif changed:
        say(f'SAE_VARIANT = "{changed}", as experiment.py says')
    return variant


def backup_of(path):
    """Returns the first free name among path.old.1, path.old.2, ..."""
    names = (path.with_name(f"{path.name}.old.{i}") for i in itertools.count(1))
    return next(name for name in names if not name.exists())


def place(path, content, template):
    """Writes a file of the copy; another one there is kept under another name, and that is said."""
    if path.exists() and path.read_bytes() != content:
        backup = backup_of(path)
        path.rename(backup)
        say(f"{path} was another: kept as {backup.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    shutil.copymode(template, path)


def place_reference(folder, template):
    """Copies a finished run of the template; one that is there stays."""
    name = "final_info.json"
    if not (folder / name).exists():
        shutil.copytree(template, folder, dirs_exist_ok=True)
    elif not filecmp.cmp(folder / name, template / name, shallow=False):
        say(f"{folder} differs from the template's {template.name}: it stays as it is")


def make_idea(template, idea, variant):
    """Makes or renews the copy of the template in the folder `idea`, set to the variant."""
    files = [Path(name) for name in FILES]
    for name in FOLDERS:
        files += [path.relative_to(template) for path in sorted((template / name).rglob("*"))
                  if path.is_file() and "__pycache__" not in path.parts]
    for name in files:
        content = (template / name).read_bytes()
        if name.name == "experiment.py":
            text = SETTING.sub(f'SAE_VARIANT = "{variant}"', content.decode("utf-8"), count=1)
            content = text.encode("utf-8")
        place(idea / name, content, template / name)
    for name in REFERENCES:
        if (template / name / "final_info.json").exists():
            place_reference(idea / name, template / name)


def main():
    """Checks the names, makes the folder, prints its path."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variant", default="", help="the variant to train")
    parser.add_argument("--idea", default="", help="the folder's name under ideas/")
    parser.add_argument("--list", action="store_true", help="print the names of the variants")
    arguments, template = parser.parse_args(), Path.cwd()
    source = (template / "experiment.py").read_text(encoding="utf-8")
    if arguments.list:
        print(", ".join(variants_of(source)))
        return

    variant = chosen_variant(source, arguments.variant)
    name = arguments.idea or variant
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        refuse(f"IDEA={name!r}: only letters, digits, _, - and .")
    idea = Path("ideas") / name
    say(f'Copying the template to {idea}, with SAE_VARIANT = "{variant}"')
    make_idea(template, idea, variant)
    print(idea)


if __name__ == "__main__":
    main()

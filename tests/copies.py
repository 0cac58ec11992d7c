"""Copies of the template, edited as an agent edits them, and what their runs leave."""
import importlib.util
import json
import math
import os
import re
import shutil
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
ROOMS = ("embedded", "data", "runtime", "pages")         # what experiment.py needs beside it
# A whole run in a few seconds
SMALL = dict(TRAIN_TOKENS=8_192, CONTEXT_LENGTH=32, EXPANSION=2, TARGET_L0=8, EPOCHS_SCALE=0.25, BATCH_TOKENS=512,
             EVAL_FILES=24)
FEWER = dict(NULL_DRAWS=3, DETECTED_LATENTS=8)             # where neither nulls nor the page are the point
IN_SAELENS = ("standard", "topk", "batch_topk", "jumprelu", "gated", "matryoshka", "tsae")
VARIANTS = (*IN_SAELENS, "slow", "temporal", "temporal_adaptation", "temporal_context", "compositional", "hierarchical")


def load_module(path):
    """The module of a file that no package holds; the path is from the project's root, or a whole one."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, PROJECT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def edit(folder, **constants):
    """Sets constants in the folder's experiment.py; each must have a line of its own there."""
    path = Path(folder) / "experiment.py"
    text = path.read_text()
    for name, value in constants.items():
        code = f"float('{value}')" if isinstance(value, float) and not math.isfinite(value) else repr(value)
        text, found = re.subn(rf"^{name} = .*$", lambda match: f"{name} = {code}", text, flags=re.M)
        assert found == 1, f"experiment.py has {found} lines that begin with {name} ="
    path.write_text(text)


def substitute(folder, old, new):
    """A SEARCH/REPLACE block: `old` must stand in the folder's experiment.py exactly once."""
    path = Path(folder) / "experiment.py"
    text = path.read_text()
    assert text.count(old) == 1, f"experiment.py has {old!r} {text.count(old)} times"
    path.write_text(text.replace(old, new))


def copy_template(folder, **constants):
    """The template in `folder`, with the small settings and these constants; its rooms are links."""
    Path(folder).mkdir(parents=True)
    shutil.copy(PROJECT / "experiment.py", folder)
    for room in ROOMS:
        (Path(folder) / room).symlink_to(PROJECT / room, target_is_directory=True)
    edit(folder, **SMALL | constants)
    return Path(folder)


def write_text_data(path):
    """A small data set of real text: the starts of the standard library's files, one a row."""
    files = sorted(Path(os.__file__).parent.rglob("*.py"))
    texts = [file.read_text(errors="ignore")[:4_000] for file in files if "site-packages" not in file.parts][:640]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts if len(text) > 500))
    return path


def results(folder, out_dir="run_1"):
    """The content of final_info.json; NaN and infinity, which are no JSON, are errors."""
    def refuse(constant):
        raise ValueError(f"{constant} in final_info.json")
    return json.loads((Path(folder) / out_dir / "final_info.json").read_text(), parse_constant=refuse)


TIMES = ("total_train_time", "avg_inference_tokens_per_second")         # results that speak of time


def timeless(value):
    """Results without what speaks of time."""
    if isinstance(value, dict):
        return {key: timeless(part) for key, part in value.items() if not key.startswith(TIMES)}
    return [timeless(part) for part in value] if isinstance(value, list) else value

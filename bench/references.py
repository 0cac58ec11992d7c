"""Makes the committed reference runs again: run_0 (standard, the baseline) and run_batch_topk (the base of `temporal`).

    python bench/references.py [FOLDER ...]

Each runs in a copy of the template, as an agent would run it; final_info.json and features.json come back. Takes 3 to 6
minutes a run on two quiet cores.
"""
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REFERENCES = {"run_0": "standard", "run_batch_topk": "batch_topk"}      # folder -> SAE_VARIANT
ROOMS = ("embedded", "data", "runtime", "pages")


def make(folder, variant):
    """Runs `variant` in a copy of the template and replaces what the repository keeps of it in `folder`."""
    with tempfile.TemporaryDirectory(prefix="reference.") as place:
        place = Path(place)
        for name in ROOMS:
            (place / name).symlink_to(ROOT / name, target_is_directory=True)
        source = (ROOT / "experiment.py").read_text(encoding="utf-8")
        source, n = re.subn(r'^SAE_VARIANT = "\w+"', f'SAE_VARIANT = "{variant}"', source, flags=re.M)
        assert n == 1, "experiment.py has no line that begins with SAE_VARIANT ="
        (place / "experiment.py").write_text(source, encoding="utf-8")
        subprocess.run([sys.executable, "experiment.py", f"--out_dir={folder}"], cwd=place, check=True)
        (ROOT / folder).mkdir(exist_ok=True)
        for name in ("final_info.json", "features.json"):
            shutil.copy(place / folder / name, ROOT / folder / name)


def main():
    if not set(sys.argv[1:]) <= set(REFERENCES):
        sys.exit(__doc__)
    for folder in sys.argv[1:] or REFERENCES:
        make(folder, REFERENCES[folder])


if __name__ == "__main__":
    main()

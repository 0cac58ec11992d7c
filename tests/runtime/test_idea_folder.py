"""`make run`: the folder that it makes, what it keeps, and which run it makes next."""
import hashlib
import subprocess
import sys

import pytest
from copies import PROJECT

EXPERIMENT = '''import sys, pathlib
SAE_VARIANT = "standard"
TARGET_L0 = 48
SAE_VARIANTS = {"standard": 1, "topk": 2, "slow": 3}
folder = pathlib.Path(sys.argv[1].removeprefix("--out_dir="))
folder.mkdir()
(folder / "final_info.json").write_text(f"{SAE_VARIANT} {TARGET_L0}")
'''
PLOT = 'import pathlib\nprint("drawn:", *sorted(path.name for path in pathlib.Path().glob("run_*")))\n'


@pytest.fixture
def template(tmp_path):
    """A template of a few lines with the project's Makefile."""
    folder = tmp_path / "template"
    for name, text in {"experiment.py": EXPERIMENT, "plot.py": PLOT, "notes.txt": "", "requirements.txt": "", "data/windows.py": "1",
                       "pages/page.py": "2", "embedded/model/config.json": "{}", "run_0/final_info.json": "standard 48"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for name in ("Makefile", "runtime/__init__.py", "runtime/idea_folder.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((PROJECT / name).read_bytes())
    return folder


@pytest.fixture
def make(template, tmp_path):
    """make(...) calls make with an environment that is there already."""
    python = "%d.%d" % sys.version_info[:2]
    environment = tmp_path / "cache" / f"venv-{python}-{hashlib.sha256(b'').hexdigest()[:12]}"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "python").symlink_to(sys.executable)
    (environment / "complete").touch()

    def call(*arguments):
        return subprocess.run(["make", f"PYTHON={sys.executable}", *arguments, f"SAE_CACHE_DIR={tmp_path / 'cache'}"], cwd=template,
                              capture_output=True, text=True)
    return call


def told(idea, i=1):
    return (idea / f"run_{i}" / "final_info.json").read_text()


def test_the_flagship_is_trained_in_a_copy(make, template):
    finished = make("run")
    assert finished.returncode == 0, finished.stderr
    idea = template / "ideas" / "slow"
    assert told(idea) == "slow 48" and "drawn: run_0 run_1" in finished.stdout
    assert (template / "experiment.py").read_text() == EXPERIMENT
    assert "\nDone. Open ideas/slow/run_1/features.html" in finished.stdout


def test_no_run_is_replaced(make, template):
    for i, variant in enumerate(("topk", "standard", "topk"), 1):
        finished = make("run", f"VARIANT={variant}", "IDEA=mine")
        assert finished.returncode == 0 and f"--out_dir=run_{i}" in finished.stdout, finished
        assert told(template / "ideas" / "mine", i) == f"{variant} 48"
    assert "drawn: run_0 run_1 run_2 run_3" in finished.stdout


def test_every_edit_in_the_copy_is_kept(make, template):
    idea = template / "ideas" / "topk"
    assert make("run", "VARIANT=topk").returncode == 0
    for i in (1, 2, 3):
        (idea / "experiment.py").write_text(f"edit {i}")
        (idea / "data" / "windows.py").write_text(f"rule {i}")
        finished = make("run", "VARIANT=topk")
        assert finished.returncode == 0 and f"kept as experiment.py.old.{i}" in finished.stderr, finished
        assert (idea / f"experiment.py.old.{i}").read_text() == f"edit {i}"
        assert (idea / "data" / f"windows.py.old.{i}").read_text() == f"rule {i}"
    assert (idea / "experiment.py.old.1").read_text() == "edit 1"
    assert "kept" not in make("run", "VARIANT=topk").stderr


def test_a_reference_made_again_in_the_copy_stays(make, template):
    idea = template / "ideas" / "topk"
    make("run", "VARIANT=topk")
    (idea / "run_0" / "final_info.json").write_text("mine")
    (idea / "run_0" / "weights").write_text("mine")
    assert "it stays as it is" in make("run", "VARIANT=topk").stderr
    assert told(idea, 0) == "mine" and (idea / "run_0" / "weights").exists()


def test_sae_variant_in_the_file_is_not_overridden_silently(make, template):
    set_to = EXPERIMENT.replace('"standard"\nTARGET', '"topk"\nTARGET')
    (template / "experiment.py").write_text(set_to)
    finished = make("run")
    assert 'SAE_VARIANT = "topk", as experiment.py says' in finished.stderr and told(template / "ideas" / "topk") == "topk 48"
    finished = make("run", "VARIANT=slow")
    assert 'experiment.py has SAE_VARIANT = "topk"; the copy has "slow"' in finished.stderr
    assert told(template / "ideas" / "slow") == "slow 48"


@pytest.mark.parametrize("arguments, message", [
    (("VARIANT=topkk",), "VARIANT=topkk is none of standard, topk, slow"),
    (("VARIANT=a b",), "VARIANT=a b is none of"),
    (("IDEA=../x",), "IDEA='../x': only letters"),
    (("IDEA=..",), "IDEA='..': only letters"),
    (("IDEA=-x",), "IDEA='-x'"),
    (("PYTHON=/nowhere/python",), "Python 3.11 or newer is needed")])
def test_refused_names_leave_no_folder(make, template, arguments, message):
    finished = make("run", *arguments)
    assert finished.returncode != 0 and message in finished.stderr and not (template / "ideas").exists(), finished
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize("source, message", [
    (EXPERIMENT.replace("SAE_VARIANT = ", "VARIANT = "), 'no line that begins with SAE_VARIANT = "..."'),
    (EXPERIMENT + "def x(:\n", "experiment.py, line 8: invalid syntax")])
def test_an_experiment_that_cannot_be_read(make, template, source, message):
    (template / "experiment.py").write_text(source)
    finished = make("run")
    assert finished.returncode != 0 and message in finished.stderr and not (template / "ideas").exists(), finished


def test_help_names_the_variants(make):
    assert "standard, topk, slow" in make("help").stdout
    assert make().stdout == make("help").stdout

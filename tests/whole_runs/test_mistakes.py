"""Mistakes in settings, folders, data and models: exit code 2 and one paragraph, in seconds."""
import json
import shutil

import pytest
import transformers

from copies import ROOMS, substitute, VARIANTS
from processes import Process, run, run_in_turn, TAIL
from lab import contents
from model_families import copy_tokenizer, ENCODERS, save_checkpoint

EARLIER = {"final_info.json": b'{"earlier": 1}'}


@pytest.fixture(scope="module")
def mistakes(lab):
    """Returns {kind: {case: (folder, Finished)}} of all mistakes below, in turn in one process."""
    kinds = {prepare: prepare(lab) for prepare in (bad_constants, bad_out_dirs, bad_data, bad_models)}
    finished = run_in_turn({folder: out_dir for cases in kinds.values() for folder, out_dir in cases.values()}, lab.cache)
    return {prepare: {case: (folder, finished[folder]) for case, (folder, _) in cases.items()} for prepare, cases in kinds.items()}


def is_one_paragraph(finished):
    """Whether it ended with exit code 2 and one paragraph, after the line of the failure, that an agent sees whole."""
    head, *message = finished.stderr.rstrip("\n").split("\n")
    told = head.startswith("experiment.py failed in: ") and len(message) == 1 and len(finished.stderr) <= TAIL
    texts = finished.stderr + finished.stdout
    return finished.code == 2 and told and not any(part in texts for part in ("://", "www.", "Traceback"))


# ---- Settings ----
CONSTANTS = [                             # constant, a bad value, what the message must say besides its name
    ("SAE_VARIANT", "topkk", VARIANTS),
    ("ABLATE", ("attention",), ["tuple", "sparsity"]),
    ("MODEL_NAME", "", []),
    ("MODEL_NAME", "../no/such/folder", []),
    ("LAYER", -1, ["None", "whole number"]),
    ("LAYER", 6, ["0 to 5"]),
    ("MODEL_NAME", "gpt2-smal", ["the hub does not answer", "'embedded/model'"]),
    ("CONTEXT_LENGTH", 4_096, ["CONTEXT_LENGTH = 4096", "512 at most"]),
    ("SEEDS", (), ["one or more"]),
    ("EVALS", "core", ["('core',), with the comma"]),
    ("DATASET", None, []),
    ("DATASET", "no/such/file.jsonl", []),
    ("TRAIN_TOKENS", 0, ["whole number"]),
    ("TRAIN_TOKENS", 10 ** 9, ["ran dry", "training tokens"]),
    ("CONTEXT_LENGTH", 4, ["whole number"]),
    ("EXPANSION", float("nan"), ["above 0"]),
    ("TARGET_L0", 2.5, ["whole number"]),
    ("TARGET_L0", 385, ["384"]),
    ("SEEDS", (0, 0), ["tuple"]),
    ("TIME_BUDGET_MINUTES", float("inf"), ["above 0"]),
    ("EVALS", ("nope",), ["tuple", "core", "temporal", "probes"]),
    ("EPOCHS_SCALE", 0, ["above 0"]),
    ("EPOCHS_SCALE", 1e-6, ["no step"]),
    ("BATCH_TOKENS", 16, ["whole number from 32"]),      # CONTEXT_LENGTH here
    ("BATCH_TOKENS", 10 ** 9, ["no step", "TRAIN_TOKENS"]),
    ("LEARNING_RATE", "fast", ["None", "above 0"]),
    ("EVAL_FILES", 1, ["whole number from 10"]),
]


def bad_constants(lab):
    return {i: (lab.copy(f"bad_{name}_{i}", **dict(EVALS=("core",)) | {name: value}), "run_1")
            for i, (name, value, _) in enumerate(CONSTANTS)}


@pytest.mark.parametrize("i", range(len(CONSTANTS)), ids=[f"{name} = {value!r}" for name, value, _ in CONSTANTS])
def test_bad_constants_are_named_with_the_good_values(mistakes, i):
    (name, _, parts), (folder, finished) = CONSTANTS[i], mistakes[bad_constants][i]
    assert is_one_paragraph(finished) and all(part in finished.tail for part in (name, *parts)), finished
    assert finished.cpu < 15 and not (folder / "run_1").exists()


def test_an_argument_is_told_where_settings_are(lab):
    finished = Process(lab.copy("argument"), ["experiment.py", "--out_dir=run_1", "--lr=1"], lab.cache).wait()
    assert finished.code == 2 and "--lr=1" in finished.tail and "constants at the top" in finished.tail, finished


def test_a_file_that_hides_a_package_is_named(lab):
    folder = lab.copy("hiding")
    (folder / "datasets.py").write_text("rows = 3")
    finished = run(folder, lab.cache, kind=Process)
    assert is_one_paragraph(finished) and "datasets.py" in finished.stderr and "rename" in finished.stderr


def test_python_without_docstrings(lab):
    finished = Process(lab.copy("stripped"), ["-OO", "experiment.py", "--out_dir=run_1"], lab.cache).wait()
    assert finished.code == 2 and "leave -OO out" in finished.tail, finished


def test_a_locale_without_unicode(lab):
    """Files are UTF-8 whatever the locale, and what it cannot show of a text is replaced."""
    plain = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    finished = Process(lab.copy("locale"), ["experiment.py", "--out_dir=run_1"], lab.cache, **plain).wait()
    assert finished.code == 0 and finished.stderr == "", finished


# ---- Folders ----
OUT_DIRS = {"file": "run_1", "below a file": "file/run_1", "here": ".", "above": "..", "no place": "/proc/run_1"}


def bad_out_dirs(lab):
    cases = {case: (lab.copy(f"out_{case}"), out_dir) for case, out_dir in OUT_DIRS.items()}
    for case, name in (("file", "run_1"), ("below a file", "file")):
        (cases[case][0] / name).write_text("mine")
    return cases


@pytest.mark.parametrize("case", OUT_DIRS)
def test_an_out_dir_that_cannot_be(mistakes, case):
    folder, finished = mistakes[bad_out_dirs][case]
    mine = {"file": {"run_1"}, "below a file": {"file"}}.get(case, set())
    left = {path.name for path in folder.iterdir()} - {"outcome.json", "__pycache__"}
    assert left == {"experiment.py", *ROOMS, *mine} and all((folder / name).read_text() == "mine" for name in mine)
    assert finished.code in (1, 2) and "Traceback" not in finished.stderr and "://" not in finished.stderr, finished
    assert str((folder / OUT_DIRS[case]).resolve()) in finished.tail and "preflight passed" not in finished.stdout, finished


def test_a_cache_that_cannot_be(lab):
    folder = lab.copy("no_cache")
    file = folder / "file"
    file.write_text("mine")
    finished = run(folder, file / "cache", kind=Process)
    assert finished.code == 2 and "SAE_CACHE_DIR" in finished.tail and str(file) in finished.tail, finished.stderr


# ---- Data ----
def data_files(root):
    """{what is wrong: (constants, what the message must say)}; the files are written."""
    def put(name, content):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    def lines(*values):
        return "".join(json.dumps(value) + "\n" for value in values)

    good = lines(*({"text": f"row {i} " * 100} for i in range(400)))
    (root / "empty_folder").mkdir(parents=True)
    (root / "gone.jsonl").symlink_to(root / "nowhere.jsonl")
    put("mixed/a.jsonl", good), put("mixed/b.csv", "text\nx\n")
    put("nanogpt/train.bin", b"abcd"), put("nanogpt/val.bin", b"abcd")
    data = {
        "no such file": (put("x", "")[:-1] + "none.jsonl", "no such file or folder"),
        "a dangling link": (str(root / "gone.jsonl"), "no such file or folder"),
        "no JSON": (put("bad.jsonl", '{"text": "a"}\n{"text": \n'), "cannot be read"),
        "no JSON at the end": (put("late.jsonl", good + '{"text": \n'), "cannot be read"),
        "no parquet": (put("bad.parquet", "no parquet"), "cannot be read"),
        "no gzip": (put("bad.jsonl.gz", "no gzip"), "cannot be read"),
        "no UTF-8": (put("bad.txt", b"\xff\xfe\x00abc"), "not UTF-8"),
        "a web page": (put("page.html", "<p>"), "kind that is not read"),
        "a pickle": (put("data.pkl", b"\x80\x04N."), "kind that is not read"),
        "nothing": (put("none.txt", ""), "is empty"),
        "blanks": (put("blank.txt", " \n \n"), "is empty"),
        "no rows": (put("none.json", "[]"), "is empty"),
        "rows without text": (put("bare.jsonl", lines(*[{"text": ""}] * 100)), "is empty"),
        "no column of text": (put("columns.csv", "question,answer,n\na,b,1\n"), "question, answer, n"),
        "a column of numbers": (put("numbers.jsonl", lines({"text": 1}, {"text": 2})), "column"),
        "no files": (str(root / "empty_folder"), "no file that can be read"),
        "files of two kinds": (str(root / "mixed"), "several kinds"),
        "no vocabulary": (str(root / "nanogpt"), "lacks meta.pkl"),
        "two words": ("two words", "hub name"),
        "too little text": (put("short.jsonl", lines(*({"text": f"row {i} " * 20} for i in range(60)))), "ran dry"),
    }
    good = put("good.jsonl", good)
    unlearning = dict(DATASET="embedded", EVALS=("unlearning",), CONTEXT_LENGTH=64)
    return {name: (dict(DATASET=path), part) for name, (path, part) in data.items()} | {
        "no domain to forget": (dict(DATASET=good, TRAIN_ON="forget", FORGET="./none.jsonl"), "no domain of DATASET"),
        "nothing to forget": (dict(DATASET=good, TRAIN_ON="forget", FORGET=put("few.jsonl", lines({"text": "a b c"}))), "ran dry"),
        "no questions": (unlearning | dict(FORGET_QUESTIONS=put("q.jsonl", lines({"text": "a"}))), "choices (4 texts)"),
        "questions that are gone": (unlearning | dict(RETAIN_QUESTIONS="./none.json"), "no such file or folder"),
    }


def bad_data(lab):
    """Without the preflight, which reads no data, and beside an earlier run."""
    cases = {}
    for name, (constants, _) in data_files(lab.root / "data").items():
        folder = lab.copy(f"data {name}", **constants)
        substitute(folder, "            preflight(config, cache)\n", "            pass\n")
        if "questions" in name:                                          # they come first, in place of last
            unlearner = "    unlearner = Unlearner(run, plan)\n"
            substitute(folder, unlearner, f'    question_scores(run, plan, {{"unclamped": None}})\n{unlearner}')
        (folder / "run_1").mkdir()
        for file, content in EARLIER.items():
            (folder / "run_1" / file).write_bytes(content)
        cases[name] = folder, "run_1"
    return cases


def test_data_that_cannot_be_used(mistakes, tmp_path):
    """The earlier run's folder stays as it was."""
    for name, (_, part) in data_files(tmp_path).items():
        folder, finished = mistakes[bad_data][name]
        assert is_one_paragraph(finished) and part in finished.tail, (name, finished)
        assert contents(folder / "run_1") == EARLIER


# ---- Models ----
MODELS = {                                # constants, with the folder of models for "*", and what the message names
    "missing": (dict(MODEL_NAME="*/none"), ["*/none", "'embedded/model'"]),
    "missing, relative": (dict(MODEL_NAME="models/of/mine"), ["'models/of/mine'", "'embedded/model'"]),
    "missing, dotted": (dict(MODEL_NAME="./models/mine"), ["'./models/mine'", "'embedded/model'"]),
    "no config": (dict(MODEL_NAME="*/empty"), ["*/empty", "config.json"]),
    "unknown family": (dict(MODEL_NAME="*/odd"), ["*/odd", "no_such_family"]),
    "no weights": (dict(MODEL_NAME="*/bare"), ["weights"]),
    "cut weights": (dict(MODEL_NAME="*/cut"), ["weights"]),
    "no tokenizer": (dict(MODEL_NAME="*/mute"), ["tokenizer"]),
    "bert": (dict(MODEL_NAME="*/bert"), ["bert", "looks ahead"]),
    "t5": (dict(MODEL_NAME="*/t5"), ["t5", "no model of the next token"]),
    "windows longer than it takes": (dict(MODEL_NAME="*/gpt2", CONTEXT_LENGTH=65), ["CONTEXT_LENGTH = 65", "64"]),
}


def write_models(root):
    """Writes folders of models, whole and broken."""
    for name in ("bert", "t5"):
        transformers.AutoModel.from_config(ENCODERS[name]).save_pretrained(root / name)
        copy_tokenizer(root / name)
    (root / "empty").mkdir()
    save_checkpoint("gpt2", root / "gpt2")
    for name, without in (("cut", ""), ("odd", ""), ("bare", "*.safetensors"), ("mute", "tokenizer*")):
        shutil.copytree(root / "gpt2", root / name, ignore=shutil.ignore_patterns(without))
    weights = root / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1_000])
    (root / "odd" / "config.json").write_text(json.dumps({"model_type": "no_such_family"}))


def bad_models(lab):
    write_models(lab.root / "models")
    cases = {}
    for i, (case, (constants, _)) in enumerate(MODELS.items()):
        name = constants["MODEL_NAME"].replace("*", str(lab.root / "models"))
        cases[case] = lab.copy(f"model_{i}", **dict(EVALS=("core",)) | constants | dict(MODEL_NAME=name)), "run_1"
    return cases


@pytest.mark.parametrize("case", MODELS)
def test_models_that_cannot_be_used(mistakes, lab, case):
    _, finished = mistakes[bad_models][case]
    parts = [part.replace("*", str(lab.root / "models")) for part in MODELS[case][1]]
    assert is_one_paragraph(finished) and all(part in finished.stderr for part in parts), finished
    assert finished.cpu < 40


def test_a_name_that_the_hub_lacks(lab):
    _, finished = lab.run("no_such_name", MODEL_NAME="pythia-70m-deduped")
    assert is_one_paragraph(finished), finished
    for part in ("'pythia-70m-deduped'", "EleutherAI/pythia-70m-deduped", "checking the settings"):
        assert part in finished.stderr
    assert finished.cpu < 40 and finished.wall < 60          # the hub's own retries take half a minute

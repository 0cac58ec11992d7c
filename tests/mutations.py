"""Edits of the kind that agents make, each with what must come of it: an error that names cause and line in what an agent
is shown of stderr, or results that are those of the unedited script, or honest ones.

`make mutations` runs them all, as a harness does, and writes the table bench/results/mutations.md; tests/whole_runs/test_mutations.py
runs those of FAST.
"""
import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from copies import copy_template, edit, FEWER, PROJECT, results, ROOMS, substitute, write_text_data
from processes import environment, Process, run, run_in_turn, TAIL

SECONDS, IMPORTS = 20, 15     # of CPU time, in which a mistake must show; and of the imports, twice what a quiet machine takes
TABLE = PROJECT / "bench" / "results" / "mutations.md"


class Mutation(NamedTuple):
    edits: tuple                  # (SEARCH, REPLACE), ...
    shown: tuple = ()             # what the end of stderr shows; none: the run succeeds
    line: str | None = None       # text of a line that it points at, where one line is to blame
    constants: dict = {}
    alone: bool = False           # in a process of its own: its imports, its last lines or its exit are what is edited
    same: bool = True             # a run that succeeds has the results of the unedited variant
    also: tuple = ()              # what else must be in final_info.json of a run that succeeds


# Where experiment.py is edited: each of these texts stands in it once
REGISTRY = "SAE_VARIANTS = {"
TABLE_OF_EVALUATIONS = "EVALUATIONS = {"
TOPK = "class TopK(SAE):"
NUMPY, MATH = "import numpy as np\n", "import math\n"
PROBES = "def eval_probes(run):\n"
HEADLINES = '("slow_explained_variance", "smoothness")'
PADDED_WINDOWS = "(0, 0, self.before, after)"
MASKED = "~batch.mask.flatten()[pairs.rows]"
MAIN, CALL_OF_MAIN, UNCALLED = "def main():\n", "    run_script(main", "    functools.partial(main"
ANCHORS = (REGISTRY, TABLE_OF_EVALUATIONS, TOPK, NUMPY, MATH, PROBES, HEADLINES, PADDED_WINDOWS, MASKED, MAIN, CALL_OF_MAIN)

HEAD = '''class Mine({base}):
    """A variant with a mistake."""
'''


def mine(body, *shown, line=None, base="TopK", before="", **more):
    """A new variant with this body."""
    constants = {"SAE_VARIANT": "mine"} | more.pop("constants", {})
    text = f"{before}{HEAD.format(base=base)}{body.rstrip()}\n\n\n"
    return Mutation(((REGISTRY, text + REGISTRY + '"mine": Mine, '),), shown, line, constants, **more)


def edited(old, new, *shown, line=None, variant="topk", **more):
    """The lines `old` become `new`."""
    return Mutation(((old, new),), shown, line, {"SAE_VARIANT": variant} | more.pop("constants", {}), **more)


def probing(lines, *shown, line=None, **more):
    """These lines at the start of an evaluation."""
    return edited(PROBES, PROBES + "".join(f"    {part}\n" for part in lines.splitlines()), *shown, line=line, **more)


def probed(value, *shown, **more):
    """An evaluation that returns this in place of what it did: metrics, curves, right."""
    return edited(PROBES, f"{PROBES}    metrics, curves, right = unedited_probes(run)\n    return {value}\n\n\n"
                  "def unedited_probes(run):\n", *shown, **more)


OWN_EVALUATION = 'def eval_mine(run):\n    return Result({"mine": 1.0}, {}, {})\n\n\n'
LOSSES = "    def losses(self, batch, latents):\n"
USUAL = "        return super().losses(batch, latents)\n"


def in_losses(lines, *shown, line=None, **more):
    """A variant whose losses do this before they are the usual ones."""
    return mine(LOSSES + "".join(f"        {part}\n" for part in lines.splitlines()) + USUAL, *shown, line=line, **more)


MUTATIONS = {
    # names, imports, syntax
    "a name that is misspelt": mine('''
    def losses(self, batch, latents):
        x_hat = self.decode(latents)
        return {"reconstruction": squared_eror(batch, x_hat), "auxk": self.auxk_loss(batch, x_hat)}
''', "NameError", "squared_eror", line="squared_eror("),
    "an attribute that is misspelt": mine('''
    def decode(self, latents):
        return latents.decode(self.W_decoder) + self.b_dec
''', "AttributeError", "W_decoder", line="W_decoder"),
    "a renamed class with uses left": edited(
        TOPK, "class TopKSAE(SAE):", "NameError", "'TopK'", "line", line="class BatchTopK(TopK):", alone=True),
    "an import that is gone": edited(MATH, "", "NameError", "'math'", line="math.", alone=True),
    "a package that is not installed": edited(
        NUMPY, "import einops_of_mine\n" + NUMPY, "ModuleNotFoundError", "einops_of_mine",
        line="import einops_of_mine", alone=True),
    "a bracket that stays open": edited(
        REGISTRY, "BROKEN = max(0.0, (1\n\n" + REGISTRY, "SyntaxError", line="BROKEN = max(0.0, (1", alone=True),
    "a block without its indent": edited(
        REGISTRY, "if SAE_VARIANT:\nBROKEN = 0.0\n\n" + REGISTRY, "IndentationError", line="BROKEN = 0.0", alone=True),
    "a variant that is not registered": edited(
        REGISTRY, HEAD.format(base="TopK") + "\n\n" + REGISTRY, "SAE_VARIANT = 'mine'", "one of", "batch_topk",
        constants={"SAE_VARIANT": "mine"}),
    "an object in place of a class": edited(
        REGISTRY, 'MINE = TopK(192, 384, 8)\nSAE_VARIANTS = {"mine": MINE, ', "SAE_VARIANTS['mine']", "a class",
        constants={"SAE_VARIANT": "mine"}),
    # shapes, types, devices
    "a reconstruction one channel short": mine('''
    def decode(self, latents):
        return latents.decode(self.W_dec)[..., :-1] + self.b_dec[:-1]
''', "191", "192", "x_hat", line="squared_error(batch, x_hat)"),
    "a reconstruction of two dimensions": mine('''
    def decode(self, latents):
        return super().decode(latents).flatten(0, 1)
''', "x_hat", "shape", "192", line="squared_error(batch, x_hat)"),
    "a product that does not fit": mine('''
    def decode(self, latents):
        return latents.dense() @ self.W_enc + self.b_dec
''', "cannot be multiplied", "384", "192", line="latents.dense() @ self.W_enc"),
    "a batch size written into the code": mine('''
    def encoder_inputs(self, batch):
        return batch.x.view(16, 31, 192), self.b_dec, self.W_enc
''', "view", "16, 31, 192", line="batch.x.view(16, 31, 192)"),
    "an encoder's input of half the width": mine('''
    def encoder_inputs(self, batch):
        return batch.x[..., :96], self.b_dec, self.W_enc
''', "the encoder's input", "96", "192"),
    "double precision in one place": mine('''
    def decode(self, latents):
        return latents.decode(self.W_dec) @ torch.eye(self.d_in, dtype=torch.float64)
''', "RuntimeError", "dtype", line="torch.eye("),
    "a tensor on another device": mine('''
    def decode(self, latents):
        return super().decode(latents) * torch.ones(self.d_in, device="meta")
''', "RuntimeError", "meta", line='device="meta"'),
    "latents as a plain tensor": mine('''
    def encode(self, batch):
        return F.relu(batch.x @ self.W_enc + self.b_enc)
''', "AttributeError", "Tensor"),
    "latents in a dictionary": mine('''
    def encode(self, batch):
        return {"latents": super().encode(batch), "pre_acts": None}
''', "AttributeError", "dict"),
    "losses as a tuple": mine('''
    def losses(self, batch, latents):
        return tuple(super().losses(batch, latents).values())
''', "`losses`", "tuple", "dict"),
    "a loss by token": mine('''
    def losses(self, batch, latents):
        return {"reconstruction": (batch.x - self.decode(latents)).square().sum(-1), "auxk": self.b_dec.sum() * 0}
''', "scalar"),
    "a loss that is a number": mine('''
    def losses(self, batch, latents):
        return super().losses(batch, latents) | {"auxk": 0.0}
''', "'auxk'", "float", "scalar"),
    # the class
    "a constructor with an argument more": mine('''
    def __init__(self, d_in, d_sae, target_l0, n_heads):
        super().__init__(d_in, d_sae, target_l0)
        self.n_heads = n_heads
''', "TypeError", "n_heads"),
    "parameters before the constructor": mine('''
    def __init__(self, *sizes):
        self.scale = nn.Parameter(torch.ones(()))
        super().__init__(*sizes)
''', "Module.__init__", line="self.scale = nn.Parameter"),
    "a constructor that returns early": mine('''
    def __init__(self, *sizes):
        nn.Module.__init__(self)
''', "AttributeError", "Mine"),
    "a buffer of what is no module": mine('''
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.helper = Helper()
''', "AttributeError", "register_buffer", line='self.register_buffer("count"', before='''class Helper:
    def __init__(self):
        self.register_buffer("count", torch.zeros(1))


'''),
    "a parameter that nothing uses": mine('''
    def __init__(self, d_in, d_sae, target_l0):
        super().__init__(d_in, d_sae, target_l0)
        self.gate_weight = nn.Parameter(torch.zeros(d_sae))
''', "gate_weight"),
    "parameters in a list": mine('''
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scales = [nn.Parameter(torch.ones(self.d_in)) for _ in range(2)]

    def decode(self, latents):
        return super().decode(latents) * self.scales[0]
''', "nn.ParameterList", "(192,)"),
    "modules in a dictionary": mine('''
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.layers = {"first": nn.Linear(self.d_in, self.d_in)}

    def decode(self, latents):
        return self.layers["first"](super().decode(latents))
''', "nn.ModuleList", "192"),
    "a constant tensor that is no buffer": mine('''
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.ones = torch.ones(self.d_in)

    def decode(self, latents):
        return super().decode(latents) * self.ones
'''),
    "a decoder of zeros": mine('''
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.W_dec.data.zero_()
''', "W_dec", "unit norm"),
    "a weight edited in place": mine('''
    def encode(self, batch):
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))
        return super().encode(batch)
''', "leaf Variable", "in-place", line="self.W_dec.div_("),
    # losses
    "a loss of a detached reconstruction": mine('''
    def losses(self, batch, latents):
        return {"reconstruction": squared_error(batch, self.decode(latents).detach()), "auxk": self.b_dec.sum() * 0}
''', "detached", "W_dec", "W_enc"),
    "all losses detached": mine('''
    def losses(self, batch, latents):
        x_hat = self.decode(latents).detach()
        return {"reconstruction": squared_error(batch, x_hat), "auxk": self.auxk_loss(batch, x_hat)}
''', "detach"),
    "a constant loss": mine('''
    def losses(self, batch, latents):
        return {"reconstruction": torch.ones(()), "auxk": torch.zeros(())}
''', "no stage's loss reaches", "W_dec", "W_enc"),
    "the logarithm of a negative number": mine('''
    def losses(self, batch, latents):
        penalty = (self.b_dec.square().sum() - 1).log()
        return {"reconstruction": squared_error(batch, self.decode(latents)) + penalty, "auxk": penalty}
''', "reconstruction = nan"),
    "zero divided by zero": mine('''
    def losses(self, batch, latents):
        share = latents.values.sum() * 0 / (latents.values < 0).sum()
        return {"reconstruction": squared_error(batch, self.decode(latents)) + share, "auxk": self.b_dec.sum() * 0}
''', "reconstruction = nan"),
    "a root whose gradient is infinite": mine('''
    def losses(self, batch, latents):
        found = super().losses(batch, latents)
        return found | {"reconstruction": found["reconstruction"] + (self.b_enc * 0).square().sum().sqrt()}
''', "nan"),
    "a loss that a stage weighs but that there is not": mine('''
    curriculum = (Stage("autoencoder", 20, {"reconstruction": 1.0, "orthogonality": 0.1}),)
''', "orthogonality", "reconstruction", "auxk"),
    "an average over padding": mine('''
    def losses(self, batch, latents):
        error = (batch.x - self.decode(latents)).square().sum(-1).mean()
        return super().losses(batch, latents) | {"reconstruction": error}
''', "reconstruction", "padding", "batch.mask"),
    "a comparison with the batch before": mine('''
    def losses(self, batch, latents):
        x_hat = self.decode(latents)
        before, self.last = getattr(self, "last", x_hat.detach()), x_hat.detach()
        change = (x_hat[:2] - before[:2]).square().mean()
        return {"reconstruction": squared_error(batch, x_hat) + change, "auxk": self.auxk_loss(batch, x_hat)}
''', "earlier batches", "register_buffer"),
    "a list that grows over batches": mine('''
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.history = []

    def losses(self, batch, latents):
        found = super().losses(batch, latents)
        self.history.append(found["reconstruction"].detach())
        return found | {"reconstruction": found["reconstruction"] / torch.stack(self.history).mean()}
''', "earlier batches", "register_buffer"),
    "graphs of earlier batches kept in a list": mine('''
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.history = []

    def losses(self, batch, latents):
        found = super().losses(batch, latents)
        self.history.append(found["reconstruction"])
        return found | {"reconstruction": torch.stack(self.history).mean()}
''', "earlier batches"),
    "random numbers of numpy": mine('''
    def losses(self, batch, latents):
        found = super().losses(batch, latents)
        return found | {"reconstruction": found["reconstruction"] * float(np.random.rand())}
''', "random numbers"),
    # what flows
    "activations edited in place": mine('''
    def encoder_inputs(self, batch):
        batch.x.sub_(self.b_dec)
        return batch.x, self.b_dec * 0, self.W_enc
''', "in-place", line="batch.x.sub_(self.b_dec)"),
    "activations clamped where no gradient flows": mine('''
    def select(self, x, W_enc, batch):
        batch.x.clamp_(-1, 1)
        return super().select(x, W_enc, batch)
''', "batch.x in place"),
    "documents mixed": mine('''
    def encoder_inputs(self, batch):
        return batch.x + batch.x[:1], self.b_dec, self.W_enc
''', "rows", "documents"),
    "inputs centred over the batch": mine('''
    def encoder_inputs(self, batch):
        return batch.x - drop_padding(batch, batch.x).mean(0), self.b_dec, self.W_enc
''', "rows", "documents"),
    "a mean over the whole window": mine('''
    def encoder_inputs(self, batch):
        seen = zero_padding(batch, batch.x).sum(1, keepdim=True) / batch.x.shape[1]
        return batch.x - seen, self.b_dec, self.W_enc
''', "later positions"),
    "a window that looks ahead": edited(
        PADDED_WINDOWS, "(0, 0, after, self.before)", "later positions", variant="temporal_context"),
    "latents not masked at padding": edited(
        MASKED, "torch.zeros_like(pairs.rows, dtype=torch.bool)", "padding"),
    "a selection over tokens in place of latents": mine('''
    def select(self, x, W_enc, batch):
        pre_acts = torch.addmm(self.b_enc, x, W_enc)
        best = torch.zeros_like(pre_acts).scatter(0, pre_acts.topk(self.k, dim=0).indices, 1.0)
        return Pairs.from_flat(best.flatten().nonzero().flatten(), pre_acts)
''', "padding"),
    # stages
    "a stage of no epochs": mine('''
    curriculum = (Stage("autoencoder", 20, PLAIN), Stage("late", 0, PLAIN))
''', "'late'", "epochs"),
    "a curriculum without its comma": mine('''
    curriculum = (Stage("autoencoder", 20, PLAIN))
''', "curriculum", "comma"),
    "a stage that trains what there is not": mine('''
    curriculum = (Stage("autoencoder", 20, PLAIN, trains=("W_decoder",)),)
''', "no stage's loss reaches", "trains"),
    "an anneal of a misspelt attribute": mine('''
    attends = 0.0
    curriculum = (Stage("autoencoder", 20, PLAIN, anneals={"atends": 1.0}),)
''', "'atends'"),
    "a setting in quotes": edited('TRAIN_TOKENS = 8192', 'TRAIN_TOKENS = "8192"', "TRAIN_TOKENS = '8192'", "whole number"),
    "a loss that is to be ablated and is not there": edited(
        "ABLATE = ()", 'ABLATE = ("contrastive",)', "ABLATE", "'auxk'"),
    # evaluations and results
    "an evaluation of what is not there": probing(
        'labels = open("labels.json").read()', "FileNotFoundError", "labels.json", line='open("labels.json")'),
    "an evaluation that needs a network": probing(
        'import datasets\nrows = datasets.load_dataset("json", data_files="https://example.org/labels.json")',
        "datasets.load_dataset", line="datasets.load_dataset("),
    "a metric that is no number": probing(
        'return Result({"mine": float(np.zeros(0).mean())}, {}, {})', "'mine'", "eval_probes", "nan"),
    "a metric of three numbers": probing('return Result({"mine": torch.ones(3)}, {}, {})', "'mine'", "eval_probes", "(3,)"),
    "a metric that is None": probing('return Result({"mine": None}, {}, {})', "'mine'", "eval_probes", "NoneType"),
    "metrics as tensors and numpy scalars": probed(
        "Result(metrics | {'a': torch.tensor(2.0), 'b': np.float32(3)}, curves, right)", also=("a", "b")),
    "curves as arrays with NaN": probed("Result(metrics, {'mine': np.array([1.0, np.nan])}, right)"),
    "a metric under two values": probed("Result(metrics | {'mine': 1.0, 'mine': 2.0}, curves, right)", also=("mine",)),
    "metrics alone in place of a result": probed("metrics", "eval_probes", "dict", "Result"),
    "an evaluation that changes weights": probing(
        "run.sae.W_dec.data *= 1.1", "eval_probes", "W_dec", "deepcopy"),
    "an evaluation that leaves training on": probing("run.sae.train()", "eval_probes", "training mode"),
    "an evaluation without a headline": edited(
        TABLE_OF_EVALUATIONS, f'{OWN_EVALUATION}EVALUATIONS = {{"mine": eval_mine, ', "EVALUATIONS['mine'] is a function", "headline", constants={"EVALS": ("core", "mine")}),
    "a headline that is misspelt": edited(
        HEADLINES, '("slow_explained_variance", "smothness")', "smothness", "'temporal'", constants={"EVALS": ("core", "temporal")}),
    "an evaluation that is one more": edited(
        TABLE_OF_EVALUATIONS, f'{OWN_EVALUATION}EVALUATIONS = {{\n    "mine": Evaluation(eval_mine, ("mine",)), ', constants={"EVALS": ("core", "mine")}, same=False, also=("mine",)),
    "an encoder that is the decoder's transpose": mine('''
    @property
    def W_enc(self):
        return self.W_dec.t()
''', same=False),
    "a stale encoder, exported in place of the one in use": mine('''
    def __init__(self, *sizes):
        super().__init__(*sizes)
        W = self.W_enc.detach().clone()
        del self.W_enc
        self.register_buffer("W_enc", W)

    def encoder_inputs(self, batch):
        return batch.x, self.b_dec, self.W_dec.t()
''', "architecture", "of its own"),
    "a constant context under SAELens's name": mine('''
    def encoder_inputs(self, batch):
        return batch.x + 0.3 * F.pad(batch.x, (0, 0, 1, -1)), self.b_dec, self.W_enc
''', "architecture", "of its own"),
    "weights that are not there to be dropped": mine('''
    def exported(self):
        return {}, ("log_threshold",)
''', "KeyError", "log_threshold", line="del weights[name]"),
    "a followed parameter of many numbers": mine('''
    def parameters_of_interest(self):
        return {"scale": self.b_enc.detach()}
''', "'scale'", "(384,)"),
    # time, memory, the end
    "a loop without an end": in_losses(
        "scale = 1.0\nwhile scale > 0:\n    scale = scale * 1.0", "no end", "endless", line="scale"),
    "loops over tokens and latents": mine('''
    def activate(self, latents):
        total = torch.zeros(len(latents.pre_acts))
        for i in range(len(latents.pre_acts)):
            for j in range(self.d_sae):
                total[i] = total[i] + latents.pre_acts[i] * (latents.pairs.ids[i] == j)
        return F.relu(total)
''', "no end", "one operation on tensors"),
    "attention between all latents": in_losses(
        "z = latents.dense()\npairs = z[..., :, None, None] * z[..., None, :, None]\n"
        "scores = pairs.expand(*z.shape, self.d_sae, 256).softmax(-2)",
        "allocate memory", "EXPANSION", line="softmax(-2)", constants={"EXPANSION": 8, "CONTEXT_LENGTH": 128,
                                                                       "BATCH_TOKENS": 1024}),
    "recursion without an end": mine('''
    def lowest_pre_act(self):
        return self.lowest_pre_act()

    def select(self, x, W_enc, batch):
        return SAE.select(self, x, W_enc, batch)
''', "RecursionError", line="return self.lowest_pre_act()"),
    "a call of sys.exit": in_losses("import sys\nsys.exit()", "sys.exit()", "before the results"),
    "a breakpoint": in_losses("breakpoint()", "BdbQuit"),
    "a question to the user": in_losses('name = input("name: ")', "EOFError", line="input("),
    "an error with an address and percent signs": in_losses(
        'raise ValueError("100 %s of it, see https://example.org/help or www.example.org")', "100 %s", "(address)",
        line="raise ValueError"),
    "a very long error": in_losses('raise ValueError("word " * 5000)', "ValueError", line="raise ValueError"),
    "a failed assertion": in_losses("assert len(batch.x) == 0", "AssertionError", line="assert len(batch.x) == 0"),
    "a full run's main left out": edited(
        CALL_OF_MAIN, UNCALLED, "without results", "run_script(main", alone=True),
    "a main that returns early": edited(MAIN, MAIN + "    return\n", "without results"),
    "errors caught and printed": edited(
        CALL_OF_MAIN, "    try:\n        main(1)\n    except Exception as error:\n        print(error)\n" + UNCALLED, "without results", alone=True),
    "warnings and lines on stderr": in_losses(
        'import sys, warnings\nwarnings.warn("a warning")\nprint("a line", file=sys.stderr)'),
    "a loss that breaks late": mine('''
    curriculum = (Stage("autoencoder", 20, PLAIN, anneals={"done": lambda done: done}),)
    done = 0.0

    def losses(self, batch, latents):
        found = super().losses(batch, latents)
        return {name: loss * float("nan") if self.done > 0.8 else loss for name, loss in found.items()}
''', "training, seed 0", "reconstruction = nan"),
    "a learning rate far too high": edited("LEARNING_RATE = None", "LEARNING_RATE = 1e30", "reconstruction = "),
}
# A dozen of all kinds, for every run of the tests
FAST = ("a name that is misspelt", "a renamed class with uses left", "a reconstruction of two dimensions", "losses as a tuple",
        "a constructor with an argument more", "parameters in a list", "a decoder of zeros", "a loss of a detached reconstruction",
        "an average over padding", "a list that grows over batches", "activations edited in place", "documents mixed",
        "a window that looks ahead", "a stage of no epochs", "metrics as tensors and numpy scalars",
        "an evaluation that changes weights", "an error with an address and percent signs", "a main that returns early")


def apply(folder, mutation):
    for old, new in mutation.edits:
        substitute(folder, old, new)


def comparable(entry):
    """An evaluation's metrics without what speaks of time."""
    return {name: value for name, value in entry["metrics"].items()
            if name not in ("total_train_time", "avg_inference_tokens_per_second")}


def verdict(folder, mutation, finished, unedited):
    """What came of it, in a few words; an AssertionError where it is not what must."""
    if not mutation.shown:
        assert finished.code == 0, f"exit {finished.code}\n{finished.tail}"
        made, wanted = results(folder), results(unedited)
        for name in wanted if mutation.same else ():
            got = comparable(made[name])
            assert {key: got[key] for key in comparable(wanted[name])} == comparable(wanted[name]), f"other results in {name}"
        assert all(any(key in entry["metrics"] for entry in made.values()) for key in mutation.also)
        return "harmless: the same results" if mutation.same else "runs, and says so"
    assert finished.code not in (0, None) and finished.code > 0, f"exit {finished.code}\n{finished.stdout[-500:]}"
    assert not (folder / "run_1").exists() and not (folder / "run_1.partial").exists(), "it left a folder"
    assert "://" not in finished.stderr and "www." not in finished.stderr, finished.stderr
    if not mutation.alone:
        assert len(finished.stderr) <= TAIL and "Traceback" not in finished.stderr, finished.stderr
    for part in mutation.shown:
        assert part in finished.tail, f"{part!r} is not in\n{finished.tail}"
    named = [int(number) for number in re.findall(r"\bline (\d+)", finished.tail)]
    lines = (folder / "experiment.py").read_text().splitlines()
    if mutation.line:
        assert any(mutation.line in lines[number - 1] for number in named), f"no line with {mutation.line!r} in\n{finished.tail}"
    assert finished.cpu < SECONDS + IMPORTS * mutation.alone, f"{finished.cpu:.0f} s"
    return f"stops, exit {finished.code}"


class Lab:
    """A cache, a data set and the unedited run."""

    def __init__(self, root):
        self.root, self.cache = Path(root), Path(root) / "cache"
        self.data = str(write_text_data(self.root / "library.jsonl"))

    def copy(self, name, mutation):
        folder = copy_template(self.root / re.sub(r"\W", "_", name), **FEWER | {"DATASET": self.data, "SAE_VARIANT": "topk"})
        apply(folder, mutation)
        edit(folder, **mutation.constants)
        return folder

    def outcomes(self, names):
        """{name: (folder, Finished)} of mutations, and the folder of the unedited run where one of them succeeds."""
        folders = {name: self.copy(name, MUTATIONS[name]) for name in names}
        unedited = self.copy("unedited", Mutation(()))
        first = [] if all(MUTATIONS[name].shown for name in names) else [unedited]
        together = first + [folders[name] for name in names if not MUTATIONS[name].alone]
        finished = run_in_turn(together, self.cache, 3_600) if together else {}
        finished |= {folders[name]: run(folders[name], self.cache, kind=Process) for name in names if MUTATIONS[name].alone}
        return {name: (folders[name], finished[folders[name]]) for name in names}, unedited


def plot_of_a_missing_run(root):
    """plot.py with a label of a run that there is not: it says so, and draws the others."""
    folder = Path(root) / "plot"
    folder.mkdir()
    shutil.copy(PROJECT / "plot.py", folder)
    for name in ("run_0", *ROOMS):
        shutil.copytree(PROJECT / name, folder / name)
    path = folder / "plot.py"
    text = path.read_text()
    text, found = re.subn(r"^labels = \{\}$", 'labels = {"run_7": "mine", "run_0": None}', text, flags=re.M)
    assert found == 1
    path.write_text(text)
    done = subprocess.run([sys.executable, "plot.py"], cwd=folder, capture_output=True, text=True, timeout=600,
                          env=environment(Path(root) / "cache"))
    assert done.returncode == 0 and "run_7" in done.stdout + done.stderr, done.stdout + done.stderr
    assert list(folder.glob("*.png"))
    return "says that it is skipped, draws the others"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="only the mutations whose names hold one of these; then no table")
    words = parser.parse_args().words
    names = [name for name in MUTATIONS if not words or any(word in name for word in words)]
    rows, wrong, began = [], 0, time.time()
    with tempfile.TemporaryDirectory() as root:
        lab = Lab(root)
        outcomes, unedited = lab.outcomes(names)
        for name in names:
            folder, finished = outcomes[name]
            try:
                said = verdict(folder, MUTATIONS[name], finished, unedited)
            except Exception as error:
                said, wrong = "**breaks the promise**", wrong + 1
                print(f"{name}: {type(error).__name__}: {error}\n", flush=True)
            last = finished.stderr.strip().split("\n")
            shown = next((line for line in reversed(last) if not line.startswith("Try:")), "")
            rows.append((name, said, f"{finished.cpu:.1f}", shown[:140].replace("|", "\\|").replace(root, "...")))
        if not words:
            rows.append(("plot.py: a label of a run that there is not", plot_of_a_missing_run(root), "", ""))
    if not words:
        text = ["# Mistakes that agents make, and what comes of each", "",
                f"`make mutations` applies {len(rows)} edits, each to a copy, and runs them as a harness does. CPU seconds of one "
                "core; most runs share one import of torch. Last column: the end of what an agent is shown.", "",
                "| edit | what comes of it | s | shown |", "|---|---|---|---|",
                *(f"| {' | '.join(row)} |" for row in rows)]
        TABLE.write_text("\n".join(text) + "\n")
    print(f"{len(rows)} mutations, {wrong} break the promise, {time.time() - began:.0f} s")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()

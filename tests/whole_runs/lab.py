"""Whole runs of copies of the template, in one cache and on one data set, and what they must leave."""
import json
from pathlib import Path

from copies import copy_template, FEWER
from processes import Finished, Process, run, run_in_turn
from runtime.files import locked

DEFAULT = ("core", "temporal", "probes", "detection")
COMMON = FEWER | dict(EVALS=("core",))
# The runs that all files share: name -> constants beside those of copies.SMALL and COMMON
TRAINED = {
    "standard": dict(SEEDS=(3, 5), EVALS=DEFAULT, CHECKPOINT_SECONDS=0, SHARD_WINDOWS=16),
    "topk": dict(DATASET="embedded", EVALS=("core", "sparse_probing"), PROBING_SIZE=(60, 20)),
    "batch_topk": dict(CHECKPOINT_SECONDS=0),
    "jumprelu": {},
    "gated": {},
    "matryoshka": {},
    "tsae": {},
    "slow": dict(EVALS=("core", "temporal")),
    "temporal": dict(EVALS=DEFAULT, CHECKPOINT_SECONDS=0),
    "temporal_adaptation": dict(EVALS=("core", "temporal")),
    "temporal_context": dict(DATASET="embedded", EVALS=("core", "unlearning"), GATE_TOKENS=8, EVAL_WINDOWS_PER_FILE=2),
    "compositional": dict(EXPANSION=4, TARGET_L0=12, EVALS=("core", "recovery", "composition"), SYNTHETIC_TASKS=("grammar",),
                          SYNTHETIC_RHOS=(1.0,), SYNTHETIC_TOKENS=8_192),
    "hierarchical": dict(EVALS=("core", "hierarchy"), TRACED_PARENTS=8),
    "hierarchical_l1": dict(SAE_VARIANT="hierarchical", EVALS=("core", "hierarchy"), TRACED_PARENTS=8, LEVEL_WIDTHS=(144, 96),
                            LEVEL_SPARSITY="l1", EPOCHS_SCALE=1.0)}
AS_A_HARNESS = "batch_topk"              # started in a Python of its own


class Lab:
    """A folder for copies, a cache that all whole runs of the tests share, and the runs of TRAINED."""

    def __init__(self, root, shared, data):
        self.root, self.shared, self.cache, self.data = root, shared, shared / "cache", str(data)

    def copy(self, name, **constants):
        return copy_template(self.root / name, **{"DATASET": self.data} | COMMON | constants)

    def run(self, name, **constants):
        """Returns (folder, Finished) of a run in a Python of its own, as a harness starts it."""
        folder = self.copy(name, **constants)
        return folder, run(folder, self.cache, kind=Process)

    def trained(self, name):
        """Returns (folder, Finished) of a run of TRAINED, which nobody changes: all are done once for all processes of the
        tests, in turn in one but for AS_A_HARNESS."""
        folders = {each: self.shared / "trained" / each for each in TRAINED}
        told = self.shared / "trained" / "finished.json"
        with locked(self.shared / "trained.lock"):
            if not told.exists():
                assert not told.parent.exists(), "the shared runs failed: see the first error"
                for each, folder in folders.items():
                    copy_template(folder, **{"DATASET": self.data, "SAE_VARIANT": each} | COMMON | TRAINED[each])
                apart = folders[AS_A_HARNESS]
                finished = {AS_A_HARNESS: run(apart, self.cache, kind=Process)}
                in_turn = run_in_turn([folder for folder in folders.values() if folder != apart], self.cache)
                told.write_text(json.dumps(finished | {folder.name: each for folder, each in in_turn.items()}))
        return folders[name], Finished(*json.loads(told.read_text())[name])


def succeeded(finished):
    assert finished.code == 0, finished.stderr
    assert finished.stderr == ""                     # it is no terminal: no bars, and nothing to say
    return finished


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}

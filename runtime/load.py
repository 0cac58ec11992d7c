"""A finished run, loaded without training it again: its SAE, and what its latents fire on.

    from runtime.load import load_run

    run = load_run("run_1")
    for latent, value, token in run.strongest("for name in names:", n=3):
        print(f"latent {latent} fires at {token!r} with {value:.2f}, and at {run.passages(latent)}")

Works for every variant and from every folder: the run's own code, which its folder keeps, computes
the latents.
"""
import functools
import importlib.util
import json
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from runtime.errors import RunnerError
from runtime.process import quiet_libraries
from runtime.provenance import ROOMS, ROOT


class Firing(NamedTuple):
    """A latent that fires on a token of a text."""
    latent: int
    value: float
    token: str


class Passage(NamedTuple):
    """A passage of a held-out document around a token on which a latent fires."""
    before: str
    token: str
    after: str
    value: float  # of the latent at the token
    document: str

    def __str__(self):
        """The passage as text, the token in brackets."""
        text = f"{self.before}[{self.token}]{self.after}"
        return f"{self.value:.2f} in {self.document}: {' '.join(text.split())}"


def load_run(folder, seed=None):
    """Returns the LoadedRun of a finished run's folder; of the first of its seeds, or of another
    one. Raises RunnerError where the folder holds no such run."""
    return LoadedRun(Path(folder), seed)


class LoadedRun:
    """A trained SAE on its language model. `sae` is the SAE, `experiment` the run's own
    experiment.py as a module, `config` its constants and facts as in final_info.json."""

    def __init__(self, folder, seed=None):
        info, folder = folder / "final_info.json", folder.resolve()
        if not info.exists():
            raise RunnerError(f"{folder} holds no finished run: it has no final_info.json.")
        self.folder = folder
        self.config = json.loads(info.read_text(encoding="utf-8"))["training"]["config"]
        seeds = self.config["SEEDS"]
        if seed is not None and seed not in seeds:
            raise RunnerError(f"{folder} has the seeds {', '.join(map(str, seeds))}, not {seed}.")
        first = seed is None or seed == seeds[0]
        trained = folder if first else folder / f"seed_{seed}"
        if not (trained / "trained_sae.safetensors").exists():
            raise RunnerError(f"{trained} has no trained_sae.safetensors: its weights were not "
                              "kept with it. Run experiment.py again.")
        quiet_libraries()
        self.experiment = self.load_code()
        self.sae, self.mean, self.scale = self.experiment.load_trained(
            trained, self.config["d_in"], self.config["steps_done"])

    def load_code(self):
        """Returns the run's experiment.py as a module, with its rooms from sources.zip."""
        self.sources = tempfile.TemporaryDirectory(prefix="run.")  # as long as this object
        place = Path(self.sources.name)
        with zipfile.ZipFile(self.folder / "sources.zip") as archive:
            archive.extractall(place)
        script = place / "experiment.py"
        script.write_bytes((self.folder / "experiment.py").read_bytes())
        spec = importlib.util.spec_from_file_location(f"experiment_of_{place.name}", script)
        module = importlib.util.module_from_spec(spec)
        self.rooms = Rooms(place)
        with self.rooms.entered():
            sys.modules[spec.name] = module  # its dataclasses look for it there
            spec.loader.exec_module(module)
        beside = self.folder.parent
        module.HERE = beside if (beside / module.MODEL_NAME).is_dir() else ROOT
        return module

    @functools.cached_property
    def tokenizer(self):
        """The model's tokenizer."""
        return self.experiment.load_tokenizer()

    @functools.cached_property
    def model(self):
        """The language model."""
        return self.experiment.load_model()

    def tokens_of(self, text):
        """Returns a text's token ids [1, 1 + n], the first one BOS. Raises RunnerError where there
        are none, or more than the SAE was trained on."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        most = self.config["CONTEXT_LENGTH"] - 1
        if not 0 < len(ids) <= most:
            raise RunnerError(f"The text has {len(ids)} tokens: 1 to {most} are possible, as many "
                              "as the windows had on which the SAE was trained.")
        return torch.tensor([[self.config["first_token"], *ids]], device=self.experiment.DEVICE)

    def batch_of(self, text):
        """Returns the Batch of one text: what the SAE's `encode`, `decode` and `losses` take."""
        module, tokens = self.experiment, self.tokens_of(text)
        raw = module.residual_after(self.model, self.config["layer"], tokens).float()
        positions = torch.arange(1, tokens.shape[1], device=raw.device)
        x = (raw[:, 1:] - self.mean) / self.scale
        return module.Batch(x, tokens[:, 1:], torch.zeros(1, device=raw.device), positions, None)

    @torch.no_grad()
    def latents_of(self, text):
        """Returns a text's tokens as texts [n], and its latents: an array [n, d_sae]."""
        batch = self.batch_of(text)
        tokens = self.experiment.token_texts(self.tokenizer, batch.tokens[0])
        return tokens, self.sae.encode(batch).dense()[0].cpu().numpy()

    def strongest(self, text, n=5):
        """Returns the Firings of the n latents with the largest values in a text, each at the token
        where it is largest."""
        tokens, values = self.latents_of(text)
        at, largest = values.argmax(0), values.max(0)
        order = np.argsort(-largest, kind="stable")[:n]
        whole = [max(j for j in range(i + 1) if tokens[j] or not j) for i in range(len(tokens))]
        return [Firing(int(i), float(largest[i]), tokens[whole[at[i]]]) for i in order
                if largest[i] > 0]

    # ---- Held-out text ----
    @functools.cached_property
    def store(self):
        """The activations of the run's data, from the cache or collected again."""
        module = self.experiment
        config, layer = module.load_config(module.MODEL_NAME, module.LAYER, module.CONTEXT_LENGTH)
        with self.rooms.entered():
            return module.open_store(config, layer, module.cache_folder())[0]

    @functools.cached_property
    def heldout_codes(self):
        """The latents of all held-out tokens, sparse [token, d_sae]."""
        encode = self.experiment.encode_windows
        return encode(self.sae, self.store, self.store.windows.heldout()).codes

    def passages(self, latent, n=3, reach=12):
        """Returns Passages of held-out documents on which a latent fires most, at most one a
        document, with `reach` tokens on either side."""
        windows = self.store.windows
        column = self.heldout_codes[:, [latent]].tocoo()
        row, at = np.divmod(column.row, windows.tokens.shape[1] - 1)
        documents, found = windows.doc_ids[windows.n_train + row], {}
        for i in np.argsort(-column.data, kind="stable"):
            if len(found) < n and documents[i] not in found:
                window = windows.n_train + row[i]
                line = windows.tokens[window, 1:windows.lengths[window]]
                texts, begin = self.experiment.token_texts(self.tokenizer, line), at[i]
                while not texts[begin]:  # within a character
                    begin -= 1
                start, end = max(0, begin - reach), at[i] + 1
                parts = texts[start:begin], texts[begin:end], texts[end:end + reach]
                found[documents[i]] = Passage(*map("".join, parts), float(column.data[i]),
                                              str(windows.names[documents[i]]))
        return [*found.values()]


class Rooms:
    """The packages data, runtime and pages of a folder, in place of those of this process."""

    def __init__(self, folder):
        self.folder, self.modules = folder, {}

    @contextmanager
    def entered(self):
        """Within the block imports, and what looks up modules by name, see the folder's."""
        mine = self.taken_out()
        sys.modules.update(self.modules or self.packages())
        try:
            yield
        finally:
            self.modules = self.taken_out()
            sys.modules.update(mine)

    def packages(self):
        """Returns {name: package} of the folder's rooms, whose modules are imported from there."""
        specs = [importlib.util.spec_from_file_location(
            room, self.folder / room / "__init__.py",
            submodule_search_locations=[str(self.folder / room)]) for room in ROOMS]
        return {spec.name: importlib.util.module_from_spec(spec) for spec in specs}

    @staticmethod
    def taken_out():
        """Removes the rooms from the imported modules, and returns them."""
        names = [name for name in sys.modules if name.split(".")[0] in ROOMS]
        return {name: sys.modules.pop(name) for name in names}

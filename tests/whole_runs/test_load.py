"""Finished runs loaded in Python, of every variant, without training."""
import re
import shutil
import sys
import zipfile

import numpy as np
import pytest

from copies import PROJECT, results
from lab import TRAINED
from runtime.errors import RunnerError
from runtime.load import load_run

TEXT = "def area(radius):\n    return 3.14 * radius ** 2\n"


@pytest.fixture
def cache(lab, monkeypatch):
    monkeypatch.setenv("SAE_CACHE_DIR", str(lab.cache))


@pytest.mark.parametrize("name", TRAINED)
def test_a_loaded_sae_is_the_trained_one(lab, cache, name):
    """Held-out activations have the very reconstruction that the run reported."""
    folder = lab.trained(name)[0]
    config = results(folder)["training"]["config"]
    run = load_run(folder / "run_1", config["SEEDS"][-1])
    reported = np.array(results(folder)["core"]["per_sequence"][-1]["fvu"])
    windows, module = run.store.windows, run.experiment
    encoded = module.encode_windows(run.sae, run.store, windows.sample())
    found = np.nanmean(encoded.error, 1) / module.variance_by_position(run.store)[1]
    assert found == pytest.approx(reported, rel=1e-5)

    tokens, values = run.latents_of(TEXT)
    assert "".join(tokens) == TEXT and values.shape == (len(tokens), config["d_sae"]) and (values != 0).any()
    strongest = run.strongest(TEXT, n=4)
    assert [firing.value for firing in strongest] == sorted(values.max(0), reverse=True)[:4]
    for firing in strongest:
        assert values[tokens.index(firing.token):, firing.latent].max() == pytest.approx(firing.value)


def test_passages_are_the_strongest_held_out_ones(lab, cache):
    run = load_run(lab.trained("topk")[0] / "run_1")
    latent = run.strongest(TEXT, n=1)[0].latent
    passages = run.passages(latent, n=3, reach=5)
    assert all(str(each).startswith(f"{each.value:.2f} in {each.document}: ") and "[" in str(each) for each in passages)
    largest = run.heldout_codes[:, [latent]].toarray().max()
    assert passages[0].value == pytest.approx(largest) and len({passage.document for passage in passages}) == len(passages)
    assert [passage.value for passage in passages] == sorted((passage.value for passage in passages), reverse=True)
    names = set(map(str, run.store.windows.names))
    for passage in passages:
        assert passage.document in names and passage.token and passage.before + passage.after


def test_the_example_of_the_readme(lab, cache, tmp_path, monkeypatch, capsys):
    readme = (PROJECT / "README.md").read_text()
    code = re.search(r"<!-- example: load -->\n```python\n(.*?)```", readme, flags=re.S)[1]
    assert len([line for line in code.splitlines() if line]) <= 7
    place = tmp_path / re.search(r'load_run\("(.+?)"\)', code)[1]
    place.parent.mkdir(parents=True)
    shutil.copytree(lab.trained("temporal")[0] / "run_1", place)        # a run alone, without its template
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    told = capsys.readouterr().out
    assert len(re.findall(r"^latent \d+ fires at '.+' with \d\.\d\d; also at:", told, flags=re.M)) == 3, told


def test_the_code_is_that_of_the_run(lab, tmp_path):
    folder = tmp_path / "run_1"
    shutil.copytree(lab.trained("standard")[0] / "run_1", folder)
    with zipfile.ZipFile(folder / "sources.zip") as archive:
        texts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / "sources.zip", "w") as archive:
        for name, text in texts.items():
            archive.writestr(name, text + b"\nMARK = 1\n" * (name == "data/windows.py"))
    before = sys.modules["runtime.files"]
    run = load_run(folder)
    assert run.experiment.load_windows.__globals__["MARK"] == 1
    import data.windows
    assert not hasattr(data.windows, "MARK") and sys.modules["runtime.files"] is before


def test_what_cannot_be_loaded(lab, tmp_path):
    folder = lab.trained("standard")[0] / "run_1"
    with pytest.raises(RunnerError, match="holds no finished run"):
        load_run(tmp_path)
    with pytest.raises(RunnerError, match="has the seeds 3, 5, not 1"):
        load_run(folder, seed=1)
    run = load_run(folder)
    for text in ("", "word " * 100):
        with pytest.raises(RunnerError, match="1 to 31 are possible"):
            run.latents_of(text)
    shutil.copytree(folder, tmp_path / "run_1")
    (tmp_path / "run_1" / "trained_sae.safetensors").unlink()
    with pytest.raises(RunnerError, match="has no trained_sae.safetensors"):
        load_run(tmp_path / "run_1")

"""Fixtures: the hub played by rows, its absence undone, the embedded model's tokenizer."""
import pytest
import transformers

from copies import PROJECT
from runtime.hub import hub_reachable


@pytest.fixture
def online_again(monkeypatch):
    """Whatever a test does to offline mode is undone after it."""
    import datasets
    from huggingface_hub import constants
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    forget = hub_reachable.cache_clear
    forget()
    yield
    forget()


@pytest.fixture
def hub(monkeypatch):
    """hub(name, configuration=None, **{split: rows}): what load_dataset streams; returns what was asked for."""
    import datasets
    stored, asked, load = {}, [], datasets.load_dataset

    def load_dataset(name, configuration=None, *, data_files=None, **options):
        if isinstance(data_files, list):
            return load(name, data_files=data_files, **options)                      # local files
        asked.append((name, configuration or data_files))
        assert options == {"streaming": True}
        return datasets.IterableDatasetDict({
            split: datasets.IterableDataset.from_generator(lambda part: iter(part), gen_kwargs={"part": tuple(some)})
            for split, some in stored[name, configuration or data_files].items()})

    def store(name, configuration=None, **splits):
        stored[name, configuration] = splits
        return asked

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("data.documents.hub_reachable", lambda: True)
    return store


@pytest.fixture(scope="session")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(PROJECT / "embedded" / "model")

"""The folder, the cache and the data set of all whole runs, also of those in other processes of the tests."""
import os

import pytest

from copies import write_text_data
from lab import Lab
from runtime.files import locked


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder that all processes of these tests see."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def data(shared):
    path = shared / "library.jsonl"
    with locked(shared / "lock"):
        if not path.exists():
            write_text_data(path)
    return path


@pytest.fixture(scope="module")
def lab(tmp_path_factory, shared, data):
    return Lab(tmp_path_factory.mktemp("runs"), shared, data)

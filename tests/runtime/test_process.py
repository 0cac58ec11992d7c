"""The next batch is made ahead; leaving early is no success."""
import threading
import time

import pytest
import torch

from runtime.process import prefetched, run_script


def test_the_next_batch_is_made_ahead(E):
    made, threads = [], set()

    def make(step):
        threads.add(threading.get_ident())
        made.append(step)
        return torch.tensor(step), None

    get = prefetched(make, slow=True)
    for step in (0, 1, 2, 7, 8):
        assert get(step)[0] == step
    time.sleep(0.2)
    assert made == [0, 1, 2, 3, 7, 8, 9] and threading.get_ident() not in threads
    assert prefetched(make, slow=False) is make


def test_a_failure_ahead_is_told(E):
    def make(step):
        return (1 / (step - 1),)

    get = prefetched(make, slow=True)
    get(0)
    with pytest.raises(ZeroDivisionError):
        get(1)


@pytest.mark.parametrize("code, said", [(None, True), (0, True), (3, False)])
def test_leaving_by_exit_is_no_success(E, monkeypatch, code, said):
    monkeypatch.setattr("runtime.process.keep_freed_memory", lambda: None)
    monkeypatch.setattr("runtime.process.bound_memory", lambda: None)
    monkeypatch.setattr("runtime.process.quiet_libraries", lambda: None)
    monkeypatch.setattr("sys.argv", ["experiment.py", "--out_dir=run_1"])
    with pytest.raises(SystemExit) as left:
        run_script(lambda: exit(code), "experiment.py", object, {}, "standard")
    assert ("sys.exit() before the results" in str(left.value.code)) == said and left.value.code not in (None, 0)

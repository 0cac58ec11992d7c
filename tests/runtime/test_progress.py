"""Plans that shrink to a deadline."""
import time

import numpy as np
import pytest

from runtime import progress
from runtime.progress import KnownTimes, Progress, fit_to_deadline, readable_time


def test_a_plan_that_fits_is_kept(E):
    steps = [100, 50]
    assert fit_to_deadline(steps, 0, [0.01, 0.02], time.time() + 60) == [100, 50]
    assert fit_to_deadline(steps, 120, [1.0, 1.0], time.time() + 60) == [100, 50]


@pytest.mark.parametrize("seconds", [[0.1, 0.1], [0.1, 0.4]])
def test_stages_to_come_shrink_in_proportion(E, seconds):
    steps = [1000, 500]
    a, b = fit_to_deadline(steps, 0, seconds, time.time() + 30)
    assert a / b == pytest.approx(2, rel=0.05) and a < 1000
    assert 27 < a * seconds[0] + b * seconds[1] <= 30               # the time is used, and not overrun
    a, b = fit_to_deadline(steps, 400, seconds, time.time() + 30)     # what is done is done
    assert a > 400 and (a - 400) / b == pytest.approx(600 / 500, rel=0.05)
    assert 27 < (a - 400) * seconds[0] + b * seconds[1] <= 30
    a, b = fit_to_deadline(steps, 1100, seconds, time.time() + 10)
    assert a == 1000 and 100 < b < 500 and (b - 100) * seconds[1] <= 10


@pytest.mark.parametrize("deadline", [-100.0, 0.0, 1e-6])
@pytest.mark.parametrize("step", [0, 3, 9, 10, 14])
def test_no_stage_shrinks_to_nothing(E, deadline, step):
    """Each stage that is still to come keeps a step; none has fewer than are done, and none grows."""
    plan = fit_to_deadline([10, 5, 1], step, [1.0, 1.0, 1.0], time.time() + deadline)
    ends = np.cumsum([10, 5, 1])
    assert all(type(n) is int and 1 <= n <= m for n, m in zip(plan, [10, 5, 1]))
    assert sum(plan) > step and all(n == m for n, m, end in zip(plan, [10, 5, 1], ends) if end <= step)
    assert plan[2] == 1


def test_times_that_a_person_reads():
    assert [readable_time(t) for t in (0, 40.4, 89.6, 240, 4_800)] == ["0 s", "40 s", "90 s", "4 min", "1 h 20 min"]


def test_lines_of_a_pipe_have_the_time_left(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    Progress("seed 3", 200, 10).update("attention", 11, {"reconstruction": 0.12345, "l0": 48.2}, 240.0)
    assert capsys.readouterr().out == "  seed 3, attention: step 11/200; reconstruction 0.1235, L0 of the batch 48.2, 4 min left\n"


def test_a_terminal_has_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(progress, "BAR_SECONDS", 0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    bar = Progress("seed 3", 200, 10)
    bar.update("attention", 11, {"reconstruction": 0.12345, "other": 2.0, "l0": 48.2}, 240.0)
    bar.close()
    told = capsys.readouterr()
    assert told.out == "" and "seed 3, attention" in told.err and "11/200" in told.err
    assert "4 min left, reconstruction 0.123, L0 of the batch 48.2" in told.err


def test_steps_take_as_long_as_last_time(tmp_path, capsys):
    path = tmp_path / "seconds.json"
    with KnownTimes(path).measured("probes", "probes, 8 latents"):
        time.sleep(0.11)
    times = KnownTimes(path)
    seconds, known = times.of(["probes, 8 latents"])
    assert known and 0.1 <= seconds < 5 and times.of(["probes, 8 latents", "core"]) == (seconds, False)
    path.write_text('{"probes, 8 latents": 70.0}')
    with KnownTimes(path).measured("evaluation 1 of 1: probes", "probes, 8 latents"):
        pass
    assert capsys.readouterr().out == "probes\nevaluation 1 of 1: probes, about 70 s\n"
    path.write_text("broken")
    assert KnownTimes(path).of(["core"]) == (0, False)

"""Plans that shrink to a deadline."""
import time

import numpy as np
import pytest

from runtime.progress import fit_to_deadline


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

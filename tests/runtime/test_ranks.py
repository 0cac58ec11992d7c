"""Several processes: what they share, and the exchange of two, played by one."""
import numpy as np
import torch

from runtime.ranks import Ranks


def test_one_process_shares_with_nobody(E):
    ranks, ids = Ranks(), np.arange(7)
    assert np.array_equal(ranks.share(ids), ids) and ranks.agree("x") == "x" and ranks.total(3) == 3
    ranks.rank, ranks.size = 1, 3
    assert ranks.share(ids).tolist() == [1, 4]
    with ranks.alone():
        assert (ranks.rank, ranks.size) == (0, 1) and len(ranks.share(ids)) == 7
    assert (ranks.rank, ranks.size) == (1, 3)


def test_the_exchange_of_two_alike(E, monkeypatch):
    """Two processes with the same part of a batch: gradients and running means stay, tokens and firings double; layouts stay,
    and what no process has a gradient of gets none."""
    ranks, exchanges = Ranks(), []
    ranks.size = 2
    monkeypatch.setattr("runtime.ranks.dist.all_reduce", lambda whole: exchanges.append(whole.mul_(2)))
    sae = E.JumpReLU(4, 6, 2)
    sae.register_buffer("running", torch.tensor([0.5, -2.0]))
    for name, p in sae.named_parameters():
        if name != "log_threshold":
            (p * torch.randn(p.shape)).sum().backward()
    before = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    n, fired = ranks.reduce(sae, 7, torch.tensor([0, 1, 0, 2, 0, 7]))
    assert n == 14 and fired.tolist() == [0, 2, 0, 4, 0, 14] and len(exchanges) == 1
    assert sae.log_threshold.grad is None and sae.running.tolist() == [0.5, -2.0]
    for name, grad in before.items():
        p = dict(sae.named_parameters())[name]
        assert torch.allclose(p.grad, grad, rtol=1e-6) and p.grad.stride() == p.stride(), name
    ranks.size = 1
    assert ranks.reduce(sae, 7, fired) == (7, fired) and len(exchanges) == 1

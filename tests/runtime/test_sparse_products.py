"""What CUDA computes in place of the CPU's operations, on the CPU."""
import pytest
import torch

from runtime.sparse_ops import csr, largest, Pairs, weighted_sums


@pytest.mark.filterwarnings("ignore:Sparse")
def test_products_of_sparse_matrices_are_those_of_bags():
    """What CUDA computes, on the CPU."""
    torch.manual_seed(0)
    counts = torch.tensor([3, 0, 5, 2])
    starts, ids = counts.cumsum(0) - counts, torch.cat([torch.randperm(9)[:n] for n in counts])
    values, table, x = torch.randn(10), torch.randn(9, 6), torch.randn(4, 6)
    bags = weighted_sums(values, ids, starts, table)
    assert torch.allclose(csr(values, ids, starts, 9) @ table, bags, atol=1e-6) and not bags[1].any()
    pairs = Pairs(ids, starts)
    assert pairs.rows.tolist() == [0] * 3 + [2] * 5 + [3] * 2
    dense = (x @ table.t())[pairs.rows, ids]
    assert torch.allclose(pairs.dots(x, table), dense, atol=1e-6)


class AsOnCuda(torch.Tensor):
    """A CPU tensor that passes for one on a GPU, where groups have another size."""
    is_cuda = property(lambda self: True)


@pytest.mark.parametrize("kind", [torch.Tensor, AsOnCuda])
@pytest.mark.parametrize("d, k", [(512, 8), (4_096, 32), (4_095, 32), (160, 5)])
def test_the_largest_by_groups_are_the_largest(kind, d, k):
    torch.manual_seed(0)
    values = torch.randn(50, d)
    top, at = (part.as_subclass(torch.Tensor) for part in largest(values.as_subclass(kind), k))
    right = values.topk(k)
    assert torch.equal(top.sort(1).values, right.values.sort(1).values)
    assert torch.equal(at.sort(1).values, right.indices.sort(1).values)
    assert torch.equal(values.gather(1, at), top)

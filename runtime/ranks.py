"""The processes of a torchrun."""
import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from runtime.errors import RunnerError


class Ranks:
    """The processes of a torchrun, each with its share of every batch: `rank` of `size`.

    A run of one process, and any process within `alone`, is 0 of 1: then none of this does
    anything.
    """
    rank, size = 0, 1

    def join(self):
        """Meets the other processes, where torchrun has started this one, takes a GPU of its own
        and leaves stdout to rank 0."""
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size == 1 or "MASTER_ADDR" not in os.environ:
            return
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        wait = timedelta(hours=6)  # rank 0 evaluates alone
        dist.init_process_group("nccl" if cuda else "gloo", timeout=wait)
        self.rank, self.size = dist.get_rank(), size
        if self.rank:
            sys.stdout = open(os.devnull, "w")

    def leave(self):
        """Parts from the other processes."""
        if self.size > 1:
            dist.destroy_process_group()

    @contextmanager
    def alone(self):
        """Makes this process 0 of 1 for the block."""
        before = self.rank, self.size
        self.rank, self.size = 0, 1
        try:
            yield
        finally:
            self.rank, self.size = before

    @contextmanager
    def first(self):
        """Lets rank 0 come through the block before the others enter it."""
        if self.rank:
            dist.barrier()
        yield
        if self.size > 1 and not self.rank:
            dist.barrier()

    def share(self, ids):
        """Returns this process's part of the windows `ids` of a step; raises RunnerError where
        there are fewer than processes."""
        if len(ids) < self.size:
            raise RunnerError(f"BATCH_TOKENS gives {len(ids)} windows a step for {self.size} "
                              "processes: raise it, or start fewer processes.")
        return ids[self.rank::self.size]

    def agree(self, value):
        """Returns rank 0's value."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, 0)
        return values[0]

    def total(self, value):
        """Returns the sum over the processes of a tensor or a number."""
        if self.size == 1:
            return value
        device = "cuda" if torch.cuda.is_available() else "cpu"
        total = torch.as_tensor(value, device=device).clone()
        dist.all_reduce(total)
        return total

    def reduce(self, module, n, fired):
        """Makes a module's gradients those of the whole batch, of which this process saw n tokens,
        and its float buffers their means over the processes. Returns n and `fired` [d_sae] summed
        over the processes. All goes in one exchange, as each has its price."""
        if self.size == 1:
            return n, fired
        parameters = [p for p in module.parameters() if p.requires_grad]
        buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.mul_(n) for p in parameters]
        known = [p.grad is not None for p in parameters]

        head = torch.tensor([float(n), *known], device=fired.device)
        parts = [head, fired, *map(as_stored, gradients), *map(as_stored, buffers)]
        whole = torch.cat(parts)
        dist.all_reduce(whole)
        (n, *known), fired, *sums = whole.split([part.numel() for part in parts])

        for gradient, total in zip(gradients, sums):
            as_stored(gradient).copy_(total).div_(n)
        for p, gradient, anywhere in zip(parameters, gradients, known):
            p.grad = gradient if anywhere else None
        for buffer, total in zip(buffers, sums[len(parameters):]):
            as_stored(buffer).copy_(total).div_(self.size)
        return n.long(), fired.long()

    def same(self, module):
        """Gives all processes rank 0's parameters and buffers of a module."""
        if self.size > 1:
            for value in (*module.parameters(), *module.buffers()):
                dist.broadcast(value.data, 0)


def as_stored(values):
    """Returns a tensor, contiguous or the transpose of such, flat, as it lies in memory: a view."""
    return (values if values.is_contiguous() else values.mT).view(-1)


RANKS = Ranks()

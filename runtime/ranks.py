"""The processes of a torchrun."""
import os
import sys
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from runtime.errors import RunnerError


class Ranks:
    """The processes of a torchrun, each with its share of every batch: `rank` of `size`. One process, and any within
    `alone`, is 0 of 1, and all of this does nothing."""
    rank, size = 0, 1

    def join(self):
        """Of a torchrun: meets the others, takes its GPU, and leaves stdout to rank 0."""
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size == 1 or "MASTER_ADDR" not in os.environ:
            return
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=6))     # rank 0 evaluates alone
        self.rank, self.size = dist.get_rank(), size
        if self.rank:
            sys.stdout = open(os.devnull, "w")

    def leave(self):
        if self.size > 1:
            dist.destroy_process_group()

    @contextmanager
    def alone(self):
        before = self.rank, self.size
        self.rank, self.size = 0, 1
        try:
            yield
        finally:
            self.rank, self.size = before

    @contextmanager
    def first(self):
        """Rank 0 does what it does before the others."""
        if self.rank:
            dist.barrier()
        yield
        if self.size > 1 and not self.rank:
            dist.barrier()

    def share(self, ids):
        """This process's part of them."""
        if len(ids) < self.size:
            raise RunnerError(f"{len(ids)} windows a step for {self.size} processes: raise BATCH_TOKENS.")
        return ids[self.rank::self.size]

    def agree(self, value):
        """Rank 0's value."""
        if self.size > 1:
            dist.broadcast_object_list(found := [value], 0)
            return found[0]
        return value

    def total(self, value):
        """Sum over the processes of a tensor or a number."""
        if self.size == 1:
            return value
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dist.all_reduce(total := torch.as_tensor(value, device=device).clone())
        return total

    def reduce(self, sae, n, fired):
        """Gradients as of the whole batch, of which this process saw n tokens; running means over the processes -> n and
        `fired` [d_sae] of all. In one exchange: each has its price."""
        if self.size == 1:
            return n, fired

        def stored(values):                                     # a view, as they lie in memory
            return (values if values.is_contiguous() else values.mT).view(-1)

        parameters = [p for p in sae.parameters() if p.requires_grad]
        buffers = [buffer for buffer in sae.buffers() if buffer.is_floating_point()]
        known = torch.tensor([float(n), *(p.grad is not None for p in parameters)], device=fired.device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.mul_(n) for p in parameters]
        parts = [known, fired, *map(stored, gradients), *map(stored, buffers)]
        dist.all_reduce(whole := torch.cat(parts))
        (n, *known), fired, *sums = whole.split([part.numel() for part in parts])
        for value, total in zip(gradients, sums):
            stored(value).copy_(total).div_(n)
        for p, grad, there in zip(parameters, gradients, known):
            p.grad = grad if there else None
        for buffer, total in zip(buffers, sums[len(parameters):]):
            stored(buffer).copy_(total).div_(self.size)
        return n.long(), fired.long()

    def same(self, sae):
        """All as rank 0 has it."""
        if self.size > 1:
            for value in (*sae.parameters(), *sae.buffers()):
                dist.broadcast(value.data, 0)


RANKS = Ranks()

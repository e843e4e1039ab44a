"""One of the two processes of test_inverse_module's DistributedDataParallel."""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import functorch_inverse as fi


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, y):
        return y + 0.3 * torch.tanh(self.linear(y))


def run(rank, path):
    """Gradients are those of the mean over both processes' data."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.manual_seed(0)
    plain = fi.InverseModule(Block(), event_dim=1, inverter=fi.FixedPoint())
    parallel = DistributedDataParallel(fi.InverseModule(Block(), event_dim=1))
    parallel.module.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    for _ in range(2):
        plain.zero_grad()
        parallel.zero_grad()
        (plain(x[0]).square().mean() / 2 + plain(x[1]).square().mean() / 2).backward()
        parallel(x[rank]).square().mean().backward()
        for a, b in zip(parallel.parameters(), plain.parameters(), strict=True):
            assert a.grad.abs().max() > 1e-4
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)
    dist.barrier()


if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[2])
    # gloo's threads now and then wait for each other forever when they are taken down.
    os._exit(0)

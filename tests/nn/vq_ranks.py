# SPDX-License-Identifier: Apache-2.0
"""One of two processes that learn a codebook together: `python vq_ranks.py rank store`. It ends, or the test fails."""

from __future__ import annotations

import datetime
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pycore.distributed import all_reduce_statistics
from pycore.nn import GroupedResidualVQ, ResidualVQ, VectorQuantize


def state(module: nn.Module) -> Tensor:
    return torch.cat([t.double().flatten() for t in module.state_dict().values()])


def assert_same(tensor: Tensor, what: str) -> None:
    both = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(both, tensor)
    assert torch.equal(*both), what


def main(rank: int, store: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    (total,) = all_reduce_statistics(torch.tensor([rank + 1.0]))
    assert total.item() == 3.0
    rows = torch.randn(2, 60, 8, generator=torch.Generator().manual_seed(5))
    makers = [
        lambda: VectorQuantize(8, 20),
        lambda: VectorQuantize(8, 20, kmeans_init=True),
        lambda: VectorQuantize(8, 20, threshold_ema_dead_code=2),
        lambda: VectorQuantize(8, 20, kmeans_init=True, threshold_ema_dead_code=4, use_cosine_sim=True),
        lambda: VectorQuantize(8, 20, kmeans_init=True, heads=2, codebook_dim=4, separate_codebook_per_head=True),
        lambda: ResidualVQ(dim=8, num_quantizers=3, codebook_size=20, kmeans_init=True, threshold_ema_dead_code=2),
        lambda: ResidualVQ(dim=8, num_quantizers=4, codebook_size=20, quantize_dropout=True, shared_codebook=True),
        lambda: GroupedResidualVQ(dim=8, groups=2, num_quantizers=3, codebook_size=9, quantize_dropout=True),
    ]
    for number, maker in enumerate(makers):
        for case in ("uneven", "one rank without valid rows", "one rank without rows", "none at all"):
            torch.manual_seed(0)
            module = maker()
            torch.manual_seed(rank)  # what is drawn differs, unless it is agreed on
            x, mask = rows, torch.ones(2, 60, dtype=torch.bool)
            if case == "uneven":
                x, mask = (x[:, :9], mask[:, :9]) if rank else (x, mask)
            elif case == "one rank without rows":
                x, mask = (x[:, :0], mask[:, :0]) if rank else (x, mask)
            elif case == "none at all" or rank:
                mask = torch.zeros_like(mask)
            for _ in range(3):
                module(x, mask=mask)
            assert_same(state(module), f"{number}: {case}")
            assert state(module).isfinite().all(), f"{number}: {case}"

    # Ranks that began apart agree on nothing, and still do not wait for each other.
    torch.manual_seed(rank)
    apart = VectorQuantize(8, 20, kmeans_init=True, sync_kmeans=False, threshold_ema_dead_code=3)
    for step in range(4):
        apart(rows[:, : 5 + 20 * rank] * (step + rank))
    assert state(apart).isfinite().all()

    # The two halves of a batch learn what one process learns from all of it.
    torch.manual_seed(0)
    apart, together = VectorQuantize(8, 20), VectorQuantize(8, 20, sync_codebook=False)
    together.load_state_dict(apart.state_dict())
    part = rows[:, :13] if rank else rows[:, 13:]
    apart(part)
    together(rows)
    torch.testing.assert_close(state(apart), state(together))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

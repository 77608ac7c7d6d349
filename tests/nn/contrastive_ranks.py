# SPDX-License-Identifier: Apache-2.0
"""One of two processes with a half of a contrastive batch: `python contrastive_ranks.py rank store`."""

from __future__ import annotations

import datetime
import sys

import torch
import torch.distributed as dist

from pycore.nn import ContrastiveLoss


def main(rank: int, store: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    generator = torch.Generator().manual_seed(3)
    inputs, weights = torch.randn(2, 24, 10, generator=generator), torch.randn(2, 10, 6, generator=generator)
    for symmetric in (True, False):

        def gradients(gather: bool, rows: slice, symmetric: bool = symmetric) -> list[torch.Tensor]:
            module = ContrastiveLoss(symmetric=symmetric, gather=gather)
            leaves = [*(weight.clone().requires_grad_() for weight in weights), module.log_scale]
            loss = module(inputs[0, rows] @ leaves[0], inputs[1, rows] @ leaves[1])
            return [loss.detach(), *torch.autograd.grad(loss, leaves)]

        whole = gradients(False, slice(None))
        mine = gradients(True, slice(12 * rank, 12 * rank + 12))
        for tensor, expected in zip(mine, whole, strict=True):
            dist.all_reduce(tensor)
            torch.testing.assert_close(tensor / 2, expected, rtol=1e-4, atol=1e-6)
    try:
        ContrastiveLoss(gather=True)(inputs[0], inputs[1], positives=torch.arange(24))
    except ValueError as error:
        assert "positives are given and must be None" in str(error)
    else:
        raise AssertionError("positives were taken")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

# SPDX-License-Identifier: Apache-2.0
"""A codebook per head, or one for all: search, lookup, and what it learns from: k-means, moving averages, revival.

Buffers have the names of vector-quantize-pytorch's, so that state dicts fit both ways. They stay float32 whatever dtype
a model is cast to. Statistics are summed in float64 in one order, over all ranks where they agree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pycore import ops
from pycore.distributed import all_reduce_statistics, is_distributed

__all__ = ["Codebook", "EmaWeight", "normalize"]

EmaWeight = Tensor | Callable[[Tensor, Tensor], Tensor] | None


def normalize(x: Tensor) -> Tensor:
    """Rows of length one, as vector-quantize-pytorch has them."""
    return F.normalize(x, dim=-1, eps=1e-6)


class Codebook(nn.Module):
    """`embed` is [heads, K, D], x [rows, heads, D] and codes [rows, heads]; one codebook takes any number of heads."""

    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor

    def __init__(
        self, dim: int, codebook_size: int, *, heads: int, cosine: bool, kmeans_init: bool, kmeans_iters: int,
        decay: float, eps: float, threshold: float, learnable: bool, ema_update: bool, manual_ema_update: bool,
        sync: bool | None, sync_kmeans: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.dim, self.codebook_size, self.num_codebooks = dim, codebook_size, heads
        self.cosine, self.kmeans_iters, self.decay, self.eps = cosine, kmeans_iters, decay, eps
        self.threshold_ema_dead_code, self.learnable_codebook = threshold, learnable
        self.ema_update, self.manual_ema_update = ema_update, manual_ema_update
        self.sync, self.sync_kmeans = sync, sync_kmeans
        embed = torch.zeros(heads, codebook_size, dim)
        if not kmeans_init:
            nn.init.kaiming_uniform_(embed)
            embed = normalize(embed) if cosine else embed
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(heads, codebook_size))
        self.register_buffer("embed_avg", embed.clone())
        if learnable:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        self._ready = not kmeans_init  # `initted` without reading a tensor
        self._pending: tuple[Tensor, Tensor] | None = None  # statistics of accumulated steps

    # ---- what a Module does with its state ---------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codebook:
        def wide(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if tensor.dtype == torch.float32 and result.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(result.device)
            return result

        super()._apply(wide, recurse)
        if self._pending is not None:
            self._pending = (wide(self._pending[0]), wide(self._pending[1]))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "initted" in state_dict:
            self._ready = bool(self.initted)

    @property
    def ready(self) -> bool:
        """Whether there are codes: k-means has had its first rows, if it was asked for."""
        return self._ready

    @property
    def synchronized(self) -> bool:
        """Whether statistics are summed over ranks."""
        return is_distributed() if self.sync is None else self.sync and is_distributed()

    # ---- search ------------------------------------------------------------------------------------------------------

    @property
    def metric(self) -> str:
        """As `pycore.ops` names it."""
        return "cosine" if self.cosine else "euclidean"

    def encode(self, x: Tensor, topk: int = 1) -> Tensor:
        """The nearest codes: x [..., heads, D] gives [..., heads, topk]."""
        with torch.no_grad():
            books = self.embed if self.num_codebooks > 1 else self.embed[0]
            return ops.vq_encode(x.detach(), books.detach(), metric=self.metric, topk=topk)

    def lookup(self, codes: Tensor) -> Tensor:
        """The vectors of codes [..., heads], [..., heads, D]; zeros for -1. Differentiable where codes are learned."""
        if self.num_codebooks == 1:
            return ops.rvq_decode(codes.unsqueeze(-1), self.embed)
        each = [ops.rvq_decode(codes[..., h, None], self.embed[h : h + 1]) for h in range(self.num_codebooks)]
        return torch.stack(each, dim=-2)

    # ---- learning ----------------------------------------------------------------------------------------------------

    def _per_book(self, x: Tensor, codes: Tensor | None = None) -> list[tuple[Tensor, Tensor | None]]:
        """Rows of x [rows, heads, D], and their codes, for each codebook."""
        if self.num_codebooks == 1:
            return [(x.reshape(-1, self.dim), None if codes is None else codes.reshape(-1))]
        return [(x[:, h], None if codes is None else codes[:, h]) for h in range(self.num_codebooks)]

    def _statistics(self, x: Tensor, codes: Tensor, sync: bool) -> tuple[Tensor, Tensor]:
        each = []
        for rows, of_rows in self._per_book(x, codes):
            assert of_rows is not None
            each.append(ops.vq_statistics(rows, of_rows, self.codebook_size))
        if len(each) == 1:
            counts, sums = (t.unsqueeze(0) for t in each[0])
        else:
            counts, sums = torch.stack([c for c, _ in each]), torch.stack([s for _, s in each])
        if sync:
            counts, sums = all_reduce_statistics(counts, sums)
        return counts, sums

    def _sample(self, rows: Tensor, count: int, sync: bool) -> tuple[Tensor, int]:
        """`count` rows drawn over all ranks that take part, the same everywhere, and how many rows there are.

        Without replacement while there are enough. No shape depends on a rank's rows.
        """
        if not sync:
            have = len(rows)
            chosen = _draw(have, count, rows.device)
            return (rows[chosen] if have else rows.new_zeros(count, rows.shape[1])), have
        world, rank = dist.get_world_size(), dist.get_rank()
        lengths = torch.zeros(world, dtype=torch.int64, device=rows.device)
        lengths[rank] = len(rows)
        dist.all_reduce(lengths)
        have, first = int(lengths.sum()), int(lengths[:rank].sum())
        chosen = _draw(have, count, rows.device)
        dist.broadcast(chosen, src=0)
        mine = (chosen >= first) & (chosen < first + len(rows))
        out = rows.new_zeros(count, rows.shape[1])
        if len(rows):
            out = torch.where(mine.unsqueeze(-1), rows[(chosen - first).clamp(0, len(rows) - 1)], out)
        dist.all_reduce(out)
        return out, have

    @torch.no_grad()
    def initialize(self, x: Tensor, valid: Tensor | None = None) -> None:
        """K-means on the first rows it sees, x [rows, heads, D] where `valid` [rows]; nothing if there are none."""
        if self._ready:
            return
        x = x if valid is None else x[valid]
        sync = self.synchronized and self.sync_kmeans
        means, seen = [], 0
        for rows, _ in self._per_book(x):
            drawn, seen = self._sample(rows, self.codebook_size, sync)
            means.append(drawn)
        if seen == 0:
            return
        embed = torch.stack(means)
        counts = torch.zeros_like(self.cluster_size)
        for _ in range(self.kmeans_iters):
            books = embed if self.num_codebooks > 1 else embed[0]
            codes = ops.vq_encode(x, books, metric=self.metric)[..., 0]
            counts, sums = self._statistics(x, codes, sync)
            new = sums / counts.clamp(min=1).unsqueeze(-1)
            embed = torch.where((counts > 0).unsqueeze(-1), normalize(new) if self.cosine else new, embed)
        self.embed_avg.copy_(embed * counts.unsqueeze(-1))
        self.cluster_size.copy_(counts)
        if self.kmeans_iters > 0:
            self.update_ema()
        else:
            self.embed.copy_(embed)
        # A cluster that k-means left empty keeps its place until the moving average moves it.
        empty = (counts == 0).unsqueeze(-1)
        self.embed.copy_(torch.where(empty, embed, self.embed))
        self.embed_avg.copy_(torch.where(empty, embed * self.eps, self.embed_avg))
        self.initted.fill_(True)
        self._ready = True

    @torch.no_grad()
    def update_ema(self) -> None:
        """The codes from the moving averages, with Laplace smoothing of their sizes."""
        total = self.cluster_size.sum(-1, keepdim=True)
        smoothed = (self.cluster_size + self.eps) / (total + self.codebook_size * self.eps) * total
        torch.div(self.embed_avg, smoothed.unsqueeze(-1), out=self.embed.data)
        if self.cosine:
            self.embed.copy_(normalize(self.embed))

    @torch.no_grad()
    def update(
        self, x: Tensor, codes: Tensor, *, weight: EmaWeight = None, accumulate: bool = False,
        ema_update: bool | None = None, expire: bool = True,
    ) -> None:  # fmt: skip
        """Takes rows x [rows, heads, D] with codes [rows, heads], -1 for rows that do not count.

        Args:
            x: what was quantized.
            codes: the codes it got.
            weight: [K] or [heads, K], how far each code's averages move; or what computes it from sums and counts.
            accumulate: only remember the statistics; the next update takes them along.
            ema_update: instead of the module's own.
            expire: replace dead codes afterwards.
        """
        ema = self.ema_update if ema_update is None else ema_update
        if not ema and self.threshold_ema_dead_code <= 0:
            return
        counts, sums = self._statistics(x, codes, self.synchronized)
        if callable(weight):
            weight = weight(sums, counts)
        if self._pending is not None:
            counts, sums = counts + self._pending[0], sums + self._pending[1]
        self._pending = (counts, sums) if accumulate else None
        if accumulate:
            return
        step = 1.0 - self.decay if weight is None else (1.0 - self.decay) * self._per_code(weight)
        self.cluster_size.lerp_(counts, step)
        self.embed_avg.lerp_(sums, step if isinstance(step, float) else step.unsqueeze(-1))
        if ema and not self.manual_ema_update:
            self.update_ema()
        if expire:
            self.expire(x, codes)

    def _per_code(self, weight: Tensor) -> Tensor:
        shape = (self.num_codebooks, self.codebook_size)
        if (
            weight.dim() > 2
            or weight.shape[-1:] != shape[1:]
            or (weight.dim() == 2 and weight.shape[0] not in (1, shape[0]))
        ):
            raise ValueError(
                f"VectorQuantize: ema_update_weight has shape {list(weight.shape)} and must have {list(shape)} or "
                f"[{shape[1]}]"
            )
        return weight.to(self.cluster_size).expand(shape)

    @torch.no_grad()
    def expire(self, x: Tensor, codes: Tensor | None = None) -> None:
        """Codes below the threshold become rows of x, and their averages with them: the next update keeps them."""
        threshold = self.threshold_ema_dead_code
        if threshold <= 0:
            return
        dead, sync = self.cluster_size < threshold, self.synchronized
        draws = dead.sum(-1)
        if sync:
            dist.all_reduce(draws, op=dist.ReduceOp.MAX)  # ranks whose sizes differ still draw together
        to_draw: list[int] = draws.tolist()
        for book, (rows, of_rows) in enumerate(self._per_book(x, codes)):
            if to_draw[book] == 0:
                continue
            places = dead[book].nonzero()[:, 0]
            rows = rows if of_rows is None else rows[of_rows >= 0]
            drawn, have = self._sample(rows, to_draw[book], sync)
            if have == 0:
                continue
            places = places[:have]  # as many as there are rows; the others wait
            drawn = drawn[: len(places)]
            self.embed[book, places] = drawn
            self.cluster_size[book, places] = threshold
            self.embed_avg[book, places] = drawn * threshold


def _draw(have: int, count: int, device: torch.device) -> Tensor:
    """Indices into `have` rows: without replacement where there are enough, else all of them and repeats behind."""
    if have == 0:
        return torch.zeros(count, dtype=torch.int64, device=device)
    if have >= count:
        return torch.randperm(have, device=device)[:count]
    return torch.cat([torch.randperm(have, device=device), torch.randint(0, have, (count - have,), device=device)])

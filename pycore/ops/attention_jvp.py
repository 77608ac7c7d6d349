# SPDX-License-Identifier: Apache-2.0
"""The tangent of attention, from calls of its two kernels: every schedule, length and dropout, and nothing quadratic.

With P the weights (D P where dropout multiplies them by D), a logit z = cap(s <q, k>) + bias has the tangent

    z' = s cap' (<q', k> + <q, k'>),    lse' = sum P z' (+ P_sink sink'),    out' = sum D P (z' v + v') - lse' out.

The backward kernel adds up w (<u, y> - delta) x over a query's keys, with w = D P s cap', u as grad_out, y as value, x
as key, and delta = 0 where it is told that out was zero. So its grad_query for the keys [k, v], the queries [q, 0], the
values [k, k'] and grad_out [q', q] has sum D P z' v behind it, in one call. Rotation by distance happens between query
and key alone, so with it the call is made the other way round: the values are one channel of v, the keys [k, k'], and
<grad_query, [q', q]> is sum D P z' v of that channel: as many calls as v has channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pycore._schema import Schema
from pycore.ops.key_tiles import rows_of_tiles

__all__ = ["attention_jvp"]

_FORWARD, _BACKWARD = Schema("attention"), Schema("attention_backward")
_NO_RULE = {
    "rope_cos": "rope's cos", "rope_sin": "rope's sin", "distance_bias": "distance_bias",
    "alibi_slopes": "alibi_slopes", "block_bias": "the schedule's correction", "numbers": "scale or softcap",
}  # fmt: skip


def attention_jvp(
    inputs: Sequence[Any], tangents: Sequence[Tensor | None], output: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The tangents of (out, lse), by those of query, key, value and sink_logits."""
    given, moving = _FORWARD.named(inputs), dict(zip(_FORWARD.names, tangents, strict=True))
    for argument, name in _NO_RULE.items():
        if moving[argument] is not None:
            raise NotImplementedError(f"{given['op']}: {name} carries a tangent, and has no forward-mode derivative")
    if given["key_layout"] == "tiles":
        length = given["value"].shape[2]
        given |= {"key": rows_of_tiles(given["key"], length), "key_layout": "rows"}
        if moving["key"] is not None:
            moving["key"] = rows_of_tiles(moving["key"], length)
    call = _Call(given)
    parts = [moving[name] for name in ("query", "key", "value")]
    query_tangent, key_tangent, value_tangent = (x if x is None else x.to(call.dtype) for x in parts)
    out, pair = call.forward(call.value)
    lse = pair[0]
    tangent, lse_tangent = torch.zeros_like(out), torch.zeros_like(lse)
    if value_tangent is not None:
        tangent = call.forward(value_tangent)[0]
    if query_tangent is not None or key_tangent is not None:
        moved, lse_tangent = call.moved(pair, query_tangent, key_tangent)
        tangent = tangent + moved
    sink_tangent = moving["sink_logits"]
    if sink_tangent is not None:
        weight = (given["sink_logits"][:, None] - lse).exp().masked_fill(lse == -torch.inf, 0)
        lse_tangent = lse_tangent + weight * sink_tangent[:, None]
    tangent = tangent - lse_tangent[..., None] * out
    if output[1].dim() == 4:  # what rounding left out of lse has no tangent of its own
        lse_tangent = torch.stack([lse_tangent, torch.zeros_like(lse_tangent)])
    return tangent, lse_tangent


class _Call:
    """An attention call, to be made again with other values, keys and queries."""

    def __init__(self, given: dict[str, Any]) -> None:
        wide = given["query"].dtype == torch.float64
        self.dtype = torch.float64 if wide else torch.float32  # of all sums
        self.query, self.key, self.value = (given[name].to(self.dtype) for name in ("query", "key", "value"))
        self.given = given | {"query": self.query, "key": self.key, "lse_pair": True}
        self.rope = given["rope_cos"] is not None
        numbers = given["numbers"]
        if given["scale"] is None:  # of the channels there are, not of those that will be added
            scale = self.query.shape[3] ** -0.5
            self.given["scale"] = scale
            if numbers is not None:
                self.given["numbers"] = torch.cat([numbers.new_ones(1) * scale, numbers[1:]])

    def forward(self, value: Tensor) -> Any:
        return _FORWARD.call(self.given | {"value": value})

    def grad_query(
        self, grad_out: Tensor | None, grad_lse: Tensor | None, lse: Tensor, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """The backward kernel's, for an out of zeros."""
        zeros = query.new_zeros(*query.shape[:3], value.shape[3])
        call = self.given | {
            "grad_out": zeros if grad_out is None else grad_out, "grad_lse": grad_lse, "out": zeros, "lse": lse,
            "query": query, "key": key, "value": value,
        }  # fmt: skip
        call |= {name: False for name in _BACKWARD.names if name.endswith("_gradient")}
        if self.rope and key.shape[3] > self.key.shape[3]:
            call |= {name: torch.cat([call[name], call[name]], 1) for name in ("rope_cos", "rope_sin")}
        return _BACKWARD.call(call)[0]

    def moved(self, lse: Tensor, query_tangent: Tensor | None, key_tangent: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sum D P z' v [B, H, Lq, Dv] and sum P z' [B, H, Lq]."""
        query_tangent = torch.zeros_like(self.query) if query_tangent is None else query_tangent
        key_tangent = torch.zeros_like(self.key) if key_tangent is None else key_tangent
        both = self.beside(query_tangent, self.query)
        query, key = self.beside(self.query, torch.zeros_like(self.query)), self.beside(self.key, key_tangent)
        ones = torch.ones_like(self.value[..., :1])
        # Without dropout: grad_lse reaches the weights past it.
        through_lse = self.grad_query(None, torch.ones_like(lse[0]), lse, query, key, ones)
        lse_tangent = (through_lse * both).sum(-1)
        dim, value_dim = self.query.shape[3], self.value.shape[3]
        if not self.rope:
            keys, queries = torch.cat([self.key, self.value], -1), pad(self.query, (0, value_dim))
            return self.grad_query(both, None, lse, queries, keys, key)[..., dim:], lse_tangent
        channels = []
        for c in range(value_dim):
            one = torch.ones_like(lse[0])[..., None]
            gradient = self.grad_query(one, None, lse, query, key, self.value[..., c : c + 1])
            channels.append((gradient * both).sum(-1))
        moved = torch.stack(channels, -1) if channels else torch.zeros_like(self.query[..., :0])
        return moved, lse_tangent

    def beside(self, x: Tensor, y: Tensor) -> Tensor:
        """Channels of x and y beside each other; pairs that are rotated stay pairs, and all of them come first."""
        if not self.rope:
            return torch.cat([x, y], -1)
        turned = 2 * self.given["rope_cos"].shape[1]
        if self.given["interleaved"]:
            return torch.cat([x[..., :turned], y[..., :turned], x[..., turned:], y[..., turned:]], -1)
        half = turned // 2
        cuts = (slice(0, half), slice(half, turned), slice(turned, None))
        return torch.cat([part[..., cut] for cut in cuts for part in (x, y)], -1)

# SPDX-License-Identifier: Apache-2.0
"""The shape of a codec, and the model of its codes: what a frame's codes are, given the frames before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pycore import ops
from pycore._checks import check_int
from pycore.cache import LambdaKVCache
from pycore.models.bytelm import Block, BytelmConfig
from pycore.nn.attention import PositionScheme
from pycore.nn.linear import Projection, RMSNorm
from pycore.ops.attention_call import AttentionOptions
from pycore.schedules import Lambda

__all__ = ["CodeModel", "CodecConfig"]


@dataclass(frozen=True)
class CodecConfig:
    """Shape of a `Codec`.

    Attributes:
        hop: samples from frame to frame, and channels of a frame; even.
        quantizers: codes of a frame, Q.
        masked: the first that many see a band of the channels each; 0 for plain residual quantization.
        codes: of every codebook.
        layers, dim, heads: of the code model.
        window: frames that its attention looks back, and the first four.
    """

    hop: int = 128
    quantizers: int = 8
    masked: int = 3
    codes: int = 256
    layers: int = 2
    dim: int = 128
    heads: int = 4
    window: int = 250

    def __post_init__(self) -> None:
        for name in ("hop", "quantizers", "codes", "layers", "dim", "heads", "window"):
            check_int("CodecConfig", name, getattr(self, name), 1)
        check_int("CodecConfig", "masked", self.masked, 0)
        if self.hop % 2:
            raise ValueError(f"CodecConfig: hop is {self.hop} and must be even")
        if self.masked > min(self.quantizers, self.hop):
            most = min(self.quantizers, self.hop)
            raise ValueError(f"CodecConfig: masked is {self.masked} and must be at most {most}, the quantizers")
        if self.codes > 4096:  # of a distribution's 2^16 shares
            raise ValueError(f"CodecConfig: codes is {self.codes} and must be at most 4096")


class CodeModel(nn.Module):
    """Distributions of a frame's codes, given the frames before it and the frame's codes so far.

    Attention runs over frames: a frame is the sum of a vector for each of its codes. Each stage has a head of its own,
    which adds the vectors of the frame's codes before it.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        shape = BytelmConfig(layers=config.layers, dim=config.dim, heads=config.heads, kv_heads=config.heads)
        self.schedule = Lambda(4, config.window)
        self.frame = nn.Parameter(torch.randn(config.quantizers, config.codes, config.dim) * 0.1)
        self.so_far = nn.Parameter(torch.randn(config.quantizers, config.codes, config.dim) * 0.1)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(config.layers))
        self.positions = PositionScheme("rope", config.heads, shape.head_dim, max_distance=config.window)
        self.norms = nn.ModuleList(RMSNorm(config.dim) for _ in range(config.quantizers))
        self.hidden = nn.ModuleList(Projection(config.dim, 2 * config.dim) for _ in range(config.quantizers))
        self.heads = nn.ModuleList(Projection(2 * config.dim, config.codes, gain=0.1) for _ in range(config.quantizers))

    def caches(self) -> list[LambdaKVCache]:
        """An empty cache for each layer."""
        return [LambdaKVCache(self.schedule.sink_size, self.schedule.window_size) for _ in self.blocks]

    def context(self, codes: Tensor, caches: list[LambdaKVCache] | None = None) -> Tensor:
        """[b, t, dim] behind frames of codes [b, t, Q], -1 for what stands before the first."""
        options = AttentionOptions(distance_limit=self.config.window, **self.positions())
        x = ops.rvq_decode(codes, self.frame)
        for layer, block in enumerate(self.blocks):
            x = block(x, options, self.schedule, None if caches is None else caches[layer])
        return x

    def stage(self, q: int, context: Tensor, codes: Tensor) -> Tensor:
        """Logits [b, t, K] of stage q, with the codes [b, t, >= q] before it in the frame."""
        known = ops.rvq_decode(codes[..., :q], self.so_far) if q else torch.zeros_like(context)
        x = self.norms[q](context + known)
        logits: Tensor = self.heads[q](functional.relu(self.hidden[q](x)).square())
        return logits

    def forward(self, codes: Tensor) -> Tensor:
        """Logits [b, t, n, K] of codes [b, t, n], the first n of Q of every frame."""
        before = functional.pad(codes[:, :-1], (0, 0, 1, 0), value=-1)[:, : codes.shape[1]]
        context = self.context(before)
        return torch.stack([self.stage(q, context, codes) for q in range(codes.shape[-1])], dim=2)

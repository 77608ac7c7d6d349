# SPDX-License-Identifier: Apache-2.0
"""Activations as sums of a few codes, to read and to steer a model by: Codebook Features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pycore import ops
from pycore.nn.vq._arguments import check_floating, check_range

__all__ = ["CodebookFeatures"]

LOSSES = ("base", "aeloss", "fullaeloss", "vqvae")


class CodebookFeatures(nn.Module):
    """Each head's activations become the mean of the k codes most alike in direction.

    Codes are learned by gradients. The output's gradient reaches the codes, and goes straight through to x.

    Args:
        dim: channels of the input.
        num_codes: codes of each head.
        k: codes of a position and head.
        num_codebooks: parts of the channels with a codebook each; in a transformer, its heads.
        loss: what forward's loss is: "base" nothing; "aeloss" the mean over positions of |output - x|^2 for the codes;
            "fullaeloss" that and `beta` times the same for x; "vqvae" as "fullaeloss", and the output's own gradient
            goes to x alone. "fullaeloss-0.5" says beta too, as the paper's code does.
        beta: see loss.
        layer_norm: normalize x for the search.
        metric: "cosine" (the paper's inner product with codes of length one), or "euclidean".

    `switch_off(codes)` keeps codes from being chosen, `switch_on(codes)` lets them again, `force(codes)` puts them in
    place of the last of the k chosen at every position, `reset()` undoes all of it. None of it is part of the state.

    Source: Tamkin et al., "Codebook Features: Sparse and Discrete Interpretability for Neural Networks". The paper adds
    the codes up; its code takes the mean, and so does this.
    """

    def __init__(
        self, dim: int, num_codes: int, *, k: int = 1, num_codebooks: int = 1, loss: str = "aeloss", beta: float = 0.25,
        layer_norm: bool = True, metric: str = "cosine",
    ) -> None:  # fmt: skip
        super().__init__()
        heads = num_codebooks
        if heads < 1 or dim % heads:
            raise ValueError(f"CodebookFeatures: num_codebooks is {heads} and must divide dim, {dim}")
        loss, dash, number = loss.partition("-")
        if dash:
            try:
                beta = float(number)
            except ValueError:
                loss = f"{loss}-{number}"
        if loss not in LOSSES:
            raise ValueError(f"CodebookFeatures: loss is {loss!r} and must be one of {', '.join(LOSSES)}")
        if metric not in ("cosine", "euclidean"):
            raise ValueError(f"CodebookFeatures: metric is {metric!r} and must be cosine or euclidean")
        check_range("CodebookFeatures", "k", k, 1, num_codes)
        self.dim, self.num_codes, self.k, self.heads = dim, num_codes, k, heads
        self.loss, self.beta, self.metric = loss, beta, metric
        self.norm: nn.Module = nn.LayerNorm(dim) if layer_norm else nn.Identity()
        self.codebook = nn.Parameter(torch.randn(heads, num_codes, dim // heads))
        self._off: list[set[int]] = [set() for _ in range(heads)]
        self._forced: list[list[int]] = [[] for _ in range(heads)]

    # ---- switching codes ---------------------------------------------------------------------------------------------

    def _codes_of(self, codes: int | list[int], head: int) -> list[int]:
        check_range("CodebookFeatures", "head", head, 0, self.heads - 1)
        chosen = [codes] if isinstance(codes, int) else list(codes)
        for code in chosen:
            if not 0 <= code < self.num_codes:
                raise IndexError(f"CodebookFeatures: codes has {code} and must have 0 to {self.num_codes - 1}")
        return chosen

    def switch_off(self, codes: int | list[int], head: int = 0) -> None:
        """These codes are chosen no more; positions with too few left get fewer."""
        chosen = self._codes_of(codes, head)
        self._off[head].update(chosen)

    def switch_on(self, codes: int | list[int], head: int = 0) -> None:
        """These codes may be chosen again."""
        chosen = self._codes_of(codes, head)
        self._off[head].difference_update(chosen)

    def force(self, codes: int | list[int], head: int = 0) -> None:
        """At every position these codes take the places of the last chosen ones."""
        chosen = self._codes_of(codes, head)
        if len(chosen) > self.k:
            raise ValueError(f"CodebookFeatures: codes has {len(chosen)} entries and must have at most k, {self.k}")
        self._forced[head] = chosen

    def reset(self) -> None:
        """All codes may be chosen and none has to be."""
        self._off = [set() for _ in range(self.heads)]
        self._forced = [[] for _ in range(self.heads)]

    # ---- public ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Codes [..., heads, k], the nearest first; -1 where too few are switched on."""
        check_floating("CodebookFeatures", x)
        if x.dim() < 1 or x.shape[-1] != self.dim:
            raise ValueError(f"CodebookFeatures: x has shape {list(x.shape)} and must have {self.dim} channels")
        parts = self._normed(x).unflatten(-1, (self.heads, -1))
        if not any(self._off):
            codes = ops.vq_encode(parts, self.codebook.detach().float(), metric=self.metric, topk=self.k)
        else:
            codes = torch.stack([self._encode_enabled(parts[..., h, :], h) for h in range(self.heads)], dim=-2)
        for head, forced in enumerate(self._forced):
            if forced:
                codes[..., head, self.k - len(forced) :] = torch.tensor(forced, device=codes.device)
        return codes

    def _normed(self, x: Tensor) -> Tensor:
        norm = self.norm
        if not isinstance(norm, nn.LayerNorm):
            return x.float()
        if x.device.type != "cpu":
            normed: Tensor = norm(x)
            return normed.float()
        # The op's rows have the same bits in any batch, so the codes have too.
        return ops.layer_norm(x.float(), norm.weight.float(), norm.bias.float(), norm.eps)

    def _encode_enabled(self, part: Tensor, head: int) -> Tensor:
        on = [code for code in range(self.num_codes) if code not in self._off[head]]
        left = torch.tensor(on, dtype=torch.int64, device=part.device)
        count = min(self.k, len(left))
        if count == 0:
            return torch.full((*part.shape[:-1], self.k), -1, dtype=torch.int64, device=part.device)
        book = self.codebook.detach().float()[head, left]
        codes = left[ops.vq_encode(part, book, metric=self.metric, topk=count)]
        return F.pad(codes, (0, self.k - count), value=-1)

    def decode(self, codes: Tensor) -> Tensor:
        """The mean of the codes' vectors, [..., heads, k] to [..., dim]; -1 adds nothing."""
        each = [
            ops.rvq_decode(codes[..., h, :], self.codebook[h].unsqueeze(0).expand(codes.shape[-1], -1, -1))
            for h in range(self.heads)
        ]
        return torch.cat(each, dim=-1) / self.k

    def forward(self, x: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """X [..., dim], or with given codes [..., heads, k] instead of the nearest: (output, codes, loss)."""
        codes = self.encode(x) if codes is None else codes
        made = self.decode(codes).to(x.dtype)
        loss = torch.zeros((), device=x.device)
        if self.loss != "base":
            positions = max(made.numel() // self.dim, 1)
            loss = (made - x.detach()).float().square().sum() / positions
            if self.loss != "aeloss":
                loss = loss + self.beta * (made.detach() - x).float().square().sum() / positions
        through = x - x.detach()
        output = (made.detach() if self.loss == "vqvae" else made) + through
        return output, codes, loss

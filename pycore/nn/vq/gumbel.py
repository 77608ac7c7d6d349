# SPDX-License-Identifier: Apache-2.0
"""Codes chosen by a learned linear map instead of a distance: fairseq's GumbelVectorQuantizer, which SpeechT5 uses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pycore.nn.vq._arguments import check_floating

__all__ = ["GumbelVectorQuantizer"]


class GumbelVectorQuantizer(nn.Module):
    """Logits for every code of every group; the largest counts, in training after Gumbel noise and with its gradient.

    Arguments, results and state dicts are fairseq's.

    Args:
        dim: channels of the input.
        num_vars: codes of a group.
        temp: (first, last, factor) of the temperature, which falls by the factor at every update.
        groups: parts of the result, each with a code.
        combine_groups: one codebook for all groups.
        vq_dim: channels of the result, a multiple of groups.
        time_first: inputs [b, n, dim]; else [b, dim, n].
        weight_proj_depth, weight_proj_factor: of the map to logits: with more than one layer, GELU between layers of
            factor times dim channels.

    Source: Baevski et al., "wav2vec 2.0", section 2; Ao et al., "SpeechT5".
    """

    def __init__(
        self, dim: int, num_vars: int, temp: tuple[float, float, float], groups: int, combine_groups: bool, vq_dim: int,
        time_first: bool = True, activation: nn.Module | None = None, weight_proj_depth: int = 1,
        weight_proj_factor: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        name = "GumbelVectorQuantizer"
        if groups < 1 or vq_dim % groups:
            raise ValueError(f"{name}: groups is {groups} and must divide vq_dim, {vq_dim}")
        if len(temp) != 3 or not (temp[0] >= temp[1] > 0 and 0 < temp[2] <= 1):
            raise ValueError(
                f"{name}: temp is {temp} and must be (first, last, factor), first >= last > 0 < factor <= 1"
            )
        self.groups, self.combine_groups, self.input_dim, self.num_vars = groups, combine_groups, dim, num_vars
        self.time_first, self.vq_dim = time_first, vq_dim
        books = 1 if combine_groups else groups
        self.vars = nn.Parameter(torch.rand(1, books * num_vars, vq_dim // groups))
        self.weight_proj: nn.Module
        if weight_proj_depth > 1:
            inner, act = dim * weight_proj_factor, nn.GELU() if activation is None else activation
            blocks = [
                nn.Sequential(nn.Linear(dim if i == 0 else inner, inner), act) for i in range(weight_proj_depth - 1)
            ]
            self.weight_proj = nn.Sequential(*blocks, nn.Linear(inner, groups * num_vars))
        else:
            self.weight_proj = nn.Linear(dim, groups * num_vars)
            nn.init.normal_(self.weight_proj.weight, mean=0, std=1)
            nn.init.zeros_(self.weight_proj.bias)
        self.max_temp, self.min_temp, self.temp_decay = temp
        self.curr_temp = self.max_temp

    def set_num_updates(self, num_updates: int) -> None:
        """Sets the temperature to that of this update."""
        self.curr_temp = max(self.max_temp * self.temp_decay**num_updates, self.min_temp)

    def _vectors(self, weights: Tensor) -> Tensor:
        """[rows, groups, num_vars] choices give [rows, vq_dim]."""
        books = self.vars.view(-1, self.num_vars, self.vq_dim // self.groups).expand(self.groups, -1, -1)
        return torch.einsum("rgv,gvd->rgd", weights, books).flatten(1)

    def forward_idx(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The result, and the codes [b, n, groups]."""
        result = self.forward(x, produce_targets=True)
        return result["x"], result["targets"]

    def forward(self, x: Tensor, produce_targets: bool = False) -> dict[str, Any]:
        """Quantizes x.

        Returns:
            A dict: "x" [b, n, vq_dim] (or [b, vq_dim, n]), "num_vars" of all groups, "code_perplexity" of the codes as
            they are chosen without noise, "prob_perplexity" of the mean probabilities (differentiable: the diversity
            loss), "temp", and with produce_targets "targets" [b, n, groups].
        """
        check_floating("GumbelVectorQuantizer", x)
        if x.dim() != 3:
            raise ValueError(f"GumbelVectorQuantizer: x has shape {list(x.shape)} and must have 3 dimensions")
        x = x if self.time_first else x.mT
        if x.shape[-1] != self.input_dim:
            raise ValueError(f"GumbelVectorQuantizer: x has {x.shape[-1]} channels and must have {self.input_dim}")
        batch, length, _ = x.shape
        logits = self.weight_proj(x.to(self.vars.dtype)).reshape(batch * length, self.groups, self.num_vars)
        codes = logits.argmax(-1)
        hard = F.one_hot(codes, self.num_vars).to(logits.dtype)
        result: dict[str, Any] = {"num_vars": self.num_vars * self.groups, "temp": self.curr_temp}
        result["code_perplexity"] = _perplexity(hard.float())
        result["prob_perplexity"] = _perplexity(logits.float().softmax(-1))
        if self.training:
            hard = F.gumbel_softmax(logits.float(), tau=self.curr_temp, hard=True).to(logits.dtype)
        if produce_targets:
            result["targets"] = hard.argmax(-1).view(batch, length, self.groups).detach()
        out = self._vectors(hard).view(batch, length, self.vq_dim).to(x.dtype)
        result["x"] = out if self.time_first else out.mT
        return result


def _perplexity(probabilities: Tensor) -> Tensor:
    """Of the mean over rows [rows, groups, num_vars], summed over groups."""
    mean = probabilities.sum(0) / max(len(probabilities), 1)
    return torch.exp(-(mean * torch.log(mean + 1e-7)).sum(-1)).sum()

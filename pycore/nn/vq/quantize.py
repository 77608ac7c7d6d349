# SPDX-License-Identifier: Apache-2.0
"""One codebook, or one per head, learned by moving averages or gradients: vector-quantize-pytorch's VectorQuantize."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pycore._tensors import check_tensor
from pycore.nn.vq._arguments import check_floating, check_range, refuse
from pycore.nn.vq._codebook import Codebook, EmaWeight, normalize
from pycore.nn.vq._gradients import directional, rotate_to, straight_through

__all__ = ["LossBreakdown", "VectorQuantize"]

# Arguments of vector-quantize-pytorch that would need every distance, or learn in ways that are not here.
UNAVAILABLE = {
    "commitment_use_cross_entropy_loss": False,
    "codebook_diversity_loss_weight": 0.0,
    "codebook_diversity_temperature": 100.0,
    "stochastic_sample_codes": False,
    "sample_codebook_temp": 1.0,
    "straight_through": False,
    "sync_affine_param": False,
    "vq_bridge": None,
    "in_place_codebook_optimizer": None,
    "manual_in_place_optimizer_update": False,
    "affine_param": False,
    "affine_param_batch_decay": 0.99,
    "affine_param_codebook_decay": 0.9,
}
UNAVAILABLE_IN_FORWARD = {"indices": None, "sample_codebook_temp": None, "codebook_transform_fn": None}


class LossBreakdown(NamedTuple):
    """The parts of the loss, unweighted."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


class VectorQuantize(nn.Module):
    """Replaces every vector by the nearest of a codebook that learns to be near.

    Arguments, results and state dicts are vector-quantize-pytorch's, for what is here; other arguments are refused by
    name. Codes are exact (`pycore.ops.vq_encode`) and everything inside is float32, whatever the input has. Where the
    two differ: masked positions are never read, and the loss over the others is the one they would have alone, with
    projections, cosine and heads too; code -1 decodes to zeros; the value with a gradient is the code's, to the bit.

    Args:
        dim: channels of the input.
        codebook_size: K.
        codebook_dim: channels of a code; another number than dim adds projections.
        heads: how many codes a vector gets, each for a part of its channels.
        separate_codebook_per_head: instead of one for all of them.
        decay, eps: of the moving averages.
        freeze_codebook: learn nothing.
        kmeans_init, kmeans_iters, sync_kmeans: k-means on the first rows seen, over all ranks.
        use_cosine_sim: codes and inputs of length one.
        layernorm_after_project_in: after the projection to codebook_dim.
        threshold_ema_dead_code: codes whose moving size falls below it become rows of the batch; 0: none do.
        channel_last: whether the input is [b, n, d]; else [b, d, n].
        accept_image_fmap, accept_3d_fmap: inputs [b, d, h, w] or [b, d, depth, h, w].
        commitment_weight: of the mean squared distance to the code in the loss.
        orthogonal_reg_weight, orthogonal_reg_active_codes_only, orthogonal_reg_max_codes: a loss on learned codebooks.
        rotation_trick: the gradient turned onto the code; the default, but for dim 1 and directional_reparam. Else it
            goes straight through.
        directional_reparam, directional_reparam_variance: DiVeQ, which learns the codebook by gradients.
        sync_codebook: sum statistics over ranks; default: where there are several.
        ema_update, manual_ema_update: learn by moving averages; only when `update_ema` is called.
        learnable_codebook: the codebook is a parameter.
        sync_update_v: how far the result moves with the codebook's own update.
        return_zeros_for_masked_padding: else masked positions are the input's.
        route_gradients_to_input: False leaves the codebook's gradient alone.

    Source: van den Oord et al., "Neural Discrete Representation Learning"; Fifty et al., arXiv 2410.06424.
    """

    def __init__(
        self, dim: int, codebook_size: int, codebook_dim: int | None = None, heads: int = 1,
        separate_codebook_per_head: bool = False, decay: float = 0.8, eps: float = 1e-5, freeze_codebook: bool = False,
        kmeans_init: bool = False, kmeans_iters: int = 10, sync_kmeans: bool = True, use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False, threshold_ema_dead_code: float = 0, channel_last: bool = True,
        accept_image_fmap: bool = False, accept_3d_fmap: bool = False, commitment_weight: float = 1.0,
        orthogonal_reg_weight: float = 0.0, orthogonal_reg_active_codes_only: bool = False,
        orthogonal_reg_max_codes: int | None = None, rotation_trick: bool | None = None,
        directional_reparam: bool = False, directional_reparam_variance: float = 5e-3,
        sync_codebook: bool | None = None, ema_update: bool | None = None, manual_ema_update: bool = False,
        learnable_codebook: bool | None = None, sync_update_v: float = 0.0,
        return_zeros_for_masked_padding: bool = True, route_gradients_to_input: bool = True, **unavailable: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        name = "VectorQuantize"
        refuse(name, unavailable, UNAVAILABLE)
        for argument, value in (("dim", dim), ("codebook_size", codebook_size), ("heads", heads)):
            if value < 1:
                raise ValueError(f"{name}: {argument} is {value} and must be at least 1")
        check_range(name, "decay", decay, 0.0, 1.0)
        check_range(name, "sync_update_v", sync_update_v, 0.0, 1.0)
        ema_update = not directional_reparam if ema_update is None else ema_update
        learnable = directional_reparam if learnable_codebook is None else learnable_codebook
        learnable = learnable or orthogonal_reg_weight > 0
        self.rotation_trick = not directional_reparam and dim > 1 if rotation_trick is None else rotation_trick
        _forbid(name, use_cosine_sim and learnable, "use_cosine_sim", "learnable_codebook")
        _forbid(name, ema_update and bool(learnable_codebook), "ema_update", "learnable_codebook")
        _forbid(name, self.rotation_trick and directional_reparam, "rotation_trick", "directional_reparam")
        _forbid(name, accept_image_fmap and accept_3d_fmap, "accept_image_fmap", "accept_3d_fmap")
        if directional_reparam and threshold_ema_dead_code <= 0:
            raise ValueError(f"{name}: threshold_ema_dead_code is 0 and must be positive with directional_reparam")
        if sync_update_v > 0 and not learnable:
            raise ValueError(f"{name}: sync_update_v is {sync_update_v} and must be 0 without learnable_codebook")

        self.dim, self.heads, self.codebook_size = dim, heads, codebook_size
        self.codebook_dim = dim if codebook_dim is None else codebook_dim
        self.separate_codebook_per_head = separate_codebook_per_head
        inner = self.codebook_dim * heads
        self.has_projections = inner != dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            linear = nn.Linear(dim, inner)
            norm = layernorm_after_project_in
            self.project_in = nn.Sequential(linear, nn.LayerNorm(inner)) if norm else linear
            self.project_out = nn.Linear(inner, dim)

        self.commitment_weight = commitment_weight
        self.has_commitment_loss = commitment_weight > 0 and not directional_reparam
        self.orthogonal_reg_weight = orthogonal_reg_weight
        self.orthogonal_reg_active_codes_only = orthogonal_reg_active_codes_only
        self.orthogonal_reg_max_codes = orthogonal_reg_max_codes
        self.directional_reparam, self.directional_reparam_variance = directional_reparam, directional_reparam_variance
        self.sync_update_v, self.learnable_codebook = sync_update_v, learnable
        self.channel_last, self.freeze_codebook = channel_last, freeze_codebook
        self.accept_image_fmap, self.accept_3d_fmap = accept_image_fmap, accept_3d_fmap
        self.use_cosine_sim, self.eps = use_cosine_sim, eps
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.route_gradients_to_input = route_gradients_to_input
        self._codebook = Codebook(
            self.codebook_dim, codebook_size, heads=heads if separate_codebook_per_head else 1, cosine=use_cosine_sim,
            kmeans_init=kmeans_init, kmeans_iters=kmeans_iters, decay=decay, eps=eps, threshold=threshold_ema_dead_code,
            learnable=learnable, ema_update=ema_update, manual_ema_update=manual_ema_update, sync=sync_codebook,
            sync_kmeans=sync_kmeans,
        )  # fmt: skip

    # ---- the codebook ------------------------------------------------------------------------------------------------

    @property
    def ema_update(self) -> bool:
        """Whether it learns by moving averages."""
        return self._codebook.ema_update

    @property
    def codebook(self) -> Tensor:
        """[K, codebook_dim], or [heads, K, codebook_dim] where each head has its own."""
        return self._codebook.embed if self.separate_codebook_per_head else self._codebook.embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        with torch.no_grad():
            self._codebook.embed.copy_(codes if self.separate_codebook_per_head else codes.unsqueeze(0))

    def update_ema(self) -> None:
        """Makes the codes of the moving averages, which `manual_ema_update` leaves to the caller."""
        self._codebook.update_ema()

    # ---- layouts: inside, everything is [b, n, channels] -------------------------------------------------------------

    def _flat(self, x: Tensor) -> Tensor:
        expected = 5 if self.accept_3d_fmap else 4 if self.accept_image_fmap else 3
        if x.dim() == 2 and expected == 3:
            return x.unsqueeze(1)
        if x.dim() != expected:
            raise ValueError(
                f"VectorQuantize: x has shape {list(x.shape)} and must have {expected} dimensions"
                f"{' or 2' if expected == 3 else ''}"
            )
        return x.flatten(2).mT if expected > 3 or not self.channel_last else x

    def _unflat(self, out: Tensor, like: Tensor, channels: bool) -> Tensor:
        """[b, n, ...] as the input was; with `channels`, the last dimension goes where the input's channels are."""
        if like.dim() == 2 and not (self.accept_image_fmap or self.accept_3d_fmap):
            return out.squeeze(1)
        if self.accept_image_fmap or self.accept_3d_fmap:
            out = out.unflatten(1, like.shape[2:])
        elif self.channel_last:
            return out
        return out.movedim(-1, 1) if channels else out

    def _check(self, x: Any, mask: Any, lens: Any) -> Tensor | None:
        name = "VectorQuantize"
        check_floating(name, x)
        check_tensor(name, "mask", mask, optional=True)
        check_tensor(name, "lens", lens, optional=True)
        first = self.accept_image_fmap or self.accept_3d_fmap or not self.channel_last
        channels = x.shape[1 if first and x.dim() > 2 else -1] if x.dim() else 0
        if channels != self.dim:
            raise ValueError(f"{name}: x has {channels} channels and must have {self.dim}")
        if mask is not None and lens is not None:
            raise ValueError(f"{name}: lens is given beside mask, and must be None then")
        if mask is None and lens is None:
            return None
        if x.dim() != 3:
            raise ValueError(f"{name}: mask goes with an x of [b, n, d], and must be None for {list(x.shape)}")
        length = x.shape[1] if self.channel_last else x.shape[2]
        if lens is not None:
            if lens.shape != x.shape[:1]:
                raise ValueError(f"{name}: lens has shape {list(lens.shape)} and must have [{x.shape[0]}]")
            mask = torch.arange(length, device=lens.device) < lens[:, None]
        if mask.shape != (x.shape[0], length) or mask.dtype != torch.bool:
            raise ValueError(
                f"{name}: mask has shape {list(mask.shape)} of {mask.dtype} and must have [{x.shape[0]}, {length}] of "
                f"torch.bool"
            )
        return mask

    def _split(self, x: Tensor) -> Tensor:
        """[b, n, heads * d] to [b, n, heads, d], in float32, of length one for cosine."""
        x = x.float().unflatten(-1, (self.heads, self.codebook_dim))
        return normalize(x) if self.use_cosine_sim else x

    # ---- steps that ResidualVQ takes too -----------------------------------------------------------------------------

    def _routed(self, x: Tensor, code: Tensor, wanted: bool) -> Tensor:
        """The code, with a gradient for x where one is wanted."""
        out = code
        if wanted and self.route_gradients_to_input:
            if self.rotation_trick:
                out = rotate_to(x, code)
            elif self.directional_reparam:
                out = directional(x, code, self.directional_reparam_variance)
            else:
                out = straight_through(x, code)
        elif not self.learnable_codebook:
            out = code.detach()
        if self.sync_update_v > 0:
            out = out + self.sync_update_v * (code - code.detach())
        return out

    def _commitment(self, x: Tensor, code: Tensor, mask: Tensor | None, frozen: bool) -> Tensor:
        """The mean squared distance over positions [b, n] that count; zero where none do."""
        if not self.learnable_codebook or frozen:
            code = code.detach()
        if mask is None:
            return F.mse_loss(code, x) if x.numel() else (code - x).sum()
        per_position = (code - x).square().flatten(2).mean(-1)
        return torch.where(mask, per_position, 0.0).sum() / mask.sum().clamp(min=1)

    def _orthogonal(self, codes: Tensor) -> Tensor:
        book = self._codebook.embed
        if self.orthogonal_reg_active_codes_only:
            used = codes.unique()
            book = book[:, used[used >= 0]]
        most = self.orthogonal_reg_max_codes
        if most is not None and book.shape[1] > most:
            book = book[:, torch.randperm(book.shape[1], device=book.device)[:most]]
        unit, count = normalize(book), book.shape[1]
        return (unit @ unit.mT).square().sum() / (book.shape[0] * count**2) - 1 / count

    # ---- public ------------------------------------------------------------------------------------------------------

    def forward(
        self, x: Tensor, indices: None = None, mask: Tensor | None = None, lens: Tensor | None = None,
        topk: int | None = None, sample_codebook_temp: None = None, freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False, codebook_transform_fn: None = None, ema_update_weight: EmaWeight = None,
        accum_ema_update: bool = False, ema_update: bool | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        """Quantizes x, and learns from it in training.

        Args:
            x: [b, n, dim] or [b, dim], or as channel_last and accept_… say. Any floating-point dtype.
            indices: not available, nor are sample_codebook_temp and codebook_transform_fn.
            mask: bool [b, n], the positions that count.
            lens: [b], the same by length.
            topk: that many nearest codes of each position, and their loss each; nothing is learned then.
            freeze_codebook: learn nothing this time.
            return_loss_breakdown: adds a LossBreakdown to what is returned.
            ema_update_weight: [K] or [heads, K], how far each code moves; or what gives it for (sums, counts).
            accum_ema_update: keep what would be learned for the next step.
            ema_update: instead of the module's own.

        Returns:
            The quantized x in its dtype; int64 codes [b, n], with heads [b, n, heads], -1 at masked positions; and the
            loss, a scalar: zero in eval mode. With topk: [b, n, k, dim], [b, n, k] and [b, n, k].
        """
        given = {"indices": indices, "sample_codebook_temp": sample_codebook_temp}
        refuse("VectorQuantize", {**given, "codebook_transform_fn": codebook_transform_fn}, UNAVAILABLE_IN_FORWARD)
        mask = self._check(x, mask, lens)
        if topk is not None and (self.heads > 1 or not 1 <= topk):
            what = f"heads is {self.heads}" if self.heads > 1 else f"topk is {topk}"
            raise ValueError(f"VectorQuantize: {what} and must be {'1 with topk' if self.heads > 1 else 'at least 1'}")
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        flat = self._flat(x)
        inside = flat if mask is None else flat.masked_fill(~mask.unsqueeze(-1), 0.0)
        rows = self._split(self.project_in(inside))
        if mask is not None:
            rows = rows.masked_fill(~mask[..., None, None], 0.0)
        book = self._codebook
        if not book.ready:
            book.initialize(rows.detach().flatten(0, 1), None if mask is None else mask.flatten())
        if topk is not None:
            return self._forward_topk(x, flat, rows, min(topk, self.codebook_size), mask, frozen, return_loss_breakdown)

        codes = book.encode(rows)[..., 0]
        if mask is not None:
            codes = codes.masked_fill(~mask.unsqueeze(-1), -1)
        code = book.lookup(codes)
        zero = rows.new_zeros(())
        commitment = orthogonal = loss = zero
        quantized = code.detach() if not self.training else self._routed(rows, code, x.requires_grad)
        if self.training:
            if self.has_commitment_loss:
                commitment = self._commitment(rows, code, mask, frozen)
                loss = loss + commitment * self.commitment_weight
            if self.orthogonal_reg_weight > 0:
                orthogonal = self._orthogonal(codes)
                loss = loss + orthogonal * self.orthogonal_reg_weight
            if not frozen:
                book.update(
                    rows.detach().flatten(0, 1), codes.flatten(0, 1), weight=ema_update_weight,
                    accumulate=accum_ema_update, ema_update=ema_update,
                )  # fmt: skip
        out = self._finish(quantized.flatten(2), flat, mask)
        codes = codes if self.heads > 1 else codes[..., 0]
        result = (self._unflat(out, x, True), self._unflat(codes, x, False), loss)
        if return_loss_breakdown:
            return (*result, LossBreakdown(commitment, zero, orthogonal, zero))
        return result

    def _forward_topk(
        self, x: Tensor, flat: Tensor, rows: Tensor, topk: int, mask: Tensor | None, frozen: bool, breakdown: bool
    ) -> tuple[Any, ...]:
        codes = self._codebook.encode(rows, topk)[:, :, 0]
        if mask is not None:
            codes = codes.masked_fill(~mask.unsqueeze(-1), -1)
        code = self._codebook.lookup(codes.unsqueeze(-1))[..., 0, :]
        repeated = rows.expand(*rows.shape[:2], topk, rows.shape[-1])
        quantized = code.detach() if not self.training else self._routed(repeated, code, x.requires_grad)
        compared = code if self.training and self.learnable_codebook and not frozen else code.detach()
        commitment = (compared - repeated).square().mean(-1)
        if mask is not None:
            commitment = torch.where(mask.unsqueeze(-1), commitment, 0.0)
        weight = self.commitment_weight if self.has_commitment_loss else 0.0 if self.training else 1.0
        loss = commitment * weight
        out = self._finish(quantized, flat.unsqueeze(-2), mask)
        out = self._unflat(out, x, False)
        if not (self.channel_last and x.dim() == 3) and x.dim() > 2:
            out = out.movedim(-1, 1)
        result = (out, self._unflat(codes, x, False), self._unflat(loss, x, False))
        zero = rows.new_zeros(())
        if breakdown:
            return (*result, LossBreakdown(commitment, zero, zero, zero))
        return result

    def _finish(self, quantized: Tensor, flat: Tensor, mask: Tensor | None) -> Tensor:
        """Projected, in the input's dtype, with what masked positions get."""
        out = self.project_out(quantized.to(flat.dtype))
        if mask is None:
            return out
        padding = torch.zeros_like(out) if self.return_zeros_for_masked_padding else flat
        return torch.where(mask[(...,) + (None,) * (out.dim() - 2)], out, padding)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes' vectors, before project_out, laid out as the input; zeros for -1."""
        return self._to_input_layout(self._vectors(indices))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What forward gives in eval mode for these codes."""
        return self._to_input_layout(self.project_out(self._vectors(indices).to(self._out_dtype())))

    def _vectors(self, indices: Tensor) -> Tensor:
        check_tensor("VectorQuantize", "indices", indices)
        if self.heads == 1:
            return self._codebook.lookup(indices.unsqueeze(-1))[..., 0, :]
        if indices.dim() == 0 or indices.shape[-1] != self.heads:
            raise ValueError(
                f"VectorQuantize: indices has shape {list(indices.shape)} and must have {self.heads} heads in its last "
                f"dimension"
            )
        return self._codebook.lookup(indices).flatten(-2)

    def _to_input_layout(self, out: Tensor) -> Tensor:
        first = self.accept_image_fmap or self.accept_3d_fmap or (not self.channel_last and out.dim() > 2)
        return out.movedim(-1, 1) if first else out

    def _out_dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.project_out.parameters()), torch.float32)

    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """Learns from x as if forward had given it these codes."""
        mask = self._check(x, mask, None)
        flat = self._flat(x)
        inside = flat if mask is None else flat.masked_fill(~mask.unsqueeze(-1), 0.0)
        with torch.no_grad():
            rows = self._split(self.project_in(inside))
        codes = indices.reshape(*flat.shape[:2], self.heads)
        if mask is not None:
            codes = codes.masked_fill(~mask.unsqueeze(-1), -1)
        self._codebook.update(rows.flatten(0, 1), codes.flatten(0, 1))

    update_ema_indices = update_indices  # as it used to be called

    def expire_codes_(self, x: Tensor) -> None:
        """Replaces dead codes by rows of x [..., heads * codebook_dim], in training."""
        if self.training:
            self._codebook.expire(self._split(x).flatten(0, -3))


def _forbid(owner: str, both: bool, one: str, other: str) -> None:
    if both:
        raise ValueError(f"{owner}: {one} is on beside {other}, and must be off then")

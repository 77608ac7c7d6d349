# SPDX-License-Identifier: Apache-2.0
"""Every codebook quantizes what the ones before it left: vector-quantize-pytorch's ResidualVQ."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pycore import ops
from pycore._tensors import check_tensor
from pycore.distributed import is_distributed
from pycore.nn.vq._arguments import check_range, refuse
from pycore.nn.vq._gradients import directional, partial_gradient, straight_through
from pycore.nn.vq.quantize import VectorQuantize

__all__ = ["ResidualVQ", "synchronized_seed"]

UNAVAILABLE = {
    "implicit_neural_codebook": False,
    "mlp_kwargs": {},
    "beam_score_quantizer_weights": None,
    "heads": 1,
    "separate_codebook_per_head": False,
    "channel_last": True,
    "accept_3d_fmap": False,
}


def synchronized_seed(device: torch.device) -> int:
    """A random number that every rank has. All ranks have to ask for it."""
    seed = torch.randint(0, 10_000, (), device=device)
    if is_distributed():
        dist.broadcast(seed, src=0)
    return int(seed)


class ResidualVQ(nn.Module):
    """Codebooks one after another, each for the residual of those before it.

    Arguments, results and state dicts are vector-quantize-pytorch's, for what is here; other arguments are refused by
    name. All stages are searched in one pass (`pycore.ops.rvq_encode`), and residuals stay float32 for every input, so
    that a bfloat16 model's output is that of its codes. Where the two differ: without the rotation trick the sum of
    the stages has the gradient of x once, not once for each stage; a beam keeps what is nearest to x so far rather
    than the least sum of the stages' losses; masks as in `VectorQuantize`; fewer codes than stages always decode.

    Args:
        dim: channels of the input.
        num_quantizers: how many stages; may be left out where codebook_size says it.
        codebook_size: codes of every stage, or a tuple with those of each.
        codebook_dim: channels of a code; another number than dim adds projections.
        shared_codebook: one for all stages, updated once a step.
        diveq: learn the codebooks by gradients, along a noisy direction from x to the sum of its codes.
        quantize_dropout: in training, stages after a random one are left out (codes -1, losses 0).
        quantize_dropout_cutoff_index: at least that many stages before the last kept one.
        quantize_dropout_multiple_of: kept stages are rounded up to a multiple of it.
        accept_image_fmap: inputs [b, d, h, w].
        beam_size, eval_beam_size: how many partial results go on from stage to stage, 1 to 16.
        quant_grad_frac: how much of a stage's gradient reaches the residual behind it.
        return_zeros_for_masked_padding: else masked positions are the input's.
        **vq: what every stage's `VectorQuantize` takes.

    Source: Zeghidour et al., "SoundStream", algorithm 1.
    """

    def __init__(
        self, *, dim: int, num_quantizers: int | None = None, codebook_size: int | tuple[int, ...],
        codebook_dim: int | None = None, shared_codebook: bool = False, diveq: bool = False,
        quantize_dropout: bool = False, quantize_dropout_cutoff_index: int = 0, quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        beam_size: int | None = None, eval_beam_size: int | None = None, quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True, **vq: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        name = type(self).__name__
        refuse(name, {key: vq.pop(key) for key in list(vq) if key in UNAVAILABLE}, UNAVAILABLE)
        if isinstance(codebook_size, int):
            if num_quantizers is None:
                raise ValueError(f"{name}: num_quantizers is None and must be given with one codebook_size for all")
            codebook_size = (codebook_size,) * num_quantizers
        sizes = tuple(codebook_size)
        if len(sizes) < 1 or (num_quantizers is not None and num_quantizers != len(sizes)):
            raise ValueError(
                f"{name}: codebook_size has {len(sizes)} entries and must have num_quantizers', {num_quantizers}"
            )
        check_range(name, "quant_grad_frac", quant_grad_frac, 0.0, 1.0)
        check_range(name, "quantize_dropout_cutoff_index", quantize_dropout_cutoff_index, 0, len(sizes) - 1)
        if eval_beam_size is not None and beam_size is None:
            raise ValueError(f"{name}: eval_beam_size is {eval_beam_size} and must be None without beam_size")
        for argument, value in (("beam_size", beam_size), ("eval_beam_size", eval_beam_size)):
            if value is not None:
                check_range(name, argument, value, 1, 16)
        if shared_codebook and len(set(sizes)) > 1:
            raise ValueError(f"{name}: codebook_size is {sizes} and must be the same for all with shared_codebook")

        self.dim, self.num_quantizers, self.codebook_sizes = dim, len(sizes), sizes
        self.codebook_dim = dim if codebook_dim is None else codebook_dim
        self.has_projections = self.codebook_dim != dim
        self.project_in: nn.Module = nn.Linear(dim, self.codebook_dim) if self.has_projections else nn.Identity()
        self.project_out: nn.Module = nn.Linear(self.codebook_dim, dim) if self.has_projections else nn.Identity()
        self.accept_image_fmap = accept_image_fmap
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.quantize_dropout = quantize_dropout and len(sizes) > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.quant_grad_frac = quant_grad_frac
        self.beam_size, self.eval_beam_size = beam_size, beam_size if eval_beam_size is None else eval_beam_size
        self.shared_codebook = shared_codebook
        if shared_codebook:
            vq["manual_ema_update"] = True
        self.diveq = diveq
        if diveq:
            vq |= {
                "ema_update": False, "learnable_codebook": True, "route_gradients_to_input": False,
                "commitment_weight": 0.0,
            }  # fmt: skip
            self.quant_grad_frac = 1.0
        self.layers = nn.ModuleList(VectorQuantize(self.codebook_dim, size, **vq) for size in sizes)
        if shared_codebook:
            for layer in self._stages[1:]:
                layer._codebook = self._stages[0]._codebook

    @property
    def _stages(self) -> list[VectorQuantize]:
        return list(self.layers)  # type: ignore[arg-type]

    @property
    def codebook_size(self) -> int:
        """Of the first stage."""
        return self.codebook_sizes[0]

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """[Q, K, codebook_dim], or a tuple of [K_q, codebook_dim] where sizes differ."""
        books = tuple(stage.codebook for stage in self._stages)
        return torch.stack(books) if len(set(self.codebook_sizes)) == 1 else books

    @property
    def channel_masks(self) -> Tensor | None:
        """[M, codebook_dim]: what the first M stages see of x; here all see the residual."""
        return None

    def _books(self) -> Any:
        """The codebooks as the ops take them."""
        if self.shared_codebook:
            book = self._stages[0].codebook
            return book.unsqueeze(0).expand(self.num_quantizers, -1, -1)
        return self.codebooks

    # ---- encoding ----------------------------------------------------------------------------------------------------

    def _encode(self, rows: Tensor, mask: Tensor | None, stages: int, beam_size: int) -> Tensor:
        """Codes [b, n, stages] of what project_in gave, in float32."""
        self._initialize(rows, mask)
        with torch.no_grad():
            books = self._books()
            books = books.detach() if isinstance(books, Tensor) else [book.detach() for book in books]
            first = self._stages[0]
            codes = ops.rvq_encode(
                rows.detach(), books, num_quantizers=stages, metric=first._codebook.metric, beam_size=beam_size,
                channel_masks=self.channel_masks,
            )  # fmt: skip
        return codes if mask is None else codes.masked_fill(~mask.unsqueeze(-1), -1)

    @torch.no_grad()
    def _initialize(self, rows: Tensor, mask: Tensor | None) -> None:
        """K-means, stage by stage: each needs the residual that the ones before it leave."""
        if all(stage._codebook.ready for stage in self._stages):
            return
        valid = None if mask is None else mask.flatten()
        x = rows.detach()
        residual = x
        for q, stage in enumerate(self._stages):
            seen = stage._split(self._stage_input(q, x, residual))
            stage._codebook.initialize(seen.flatten(0, 1), valid)
            residual = residual - stage._codebook.lookup(stage._codebook.encode(seen)[..., 0])[..., 0, :]

    def _stage_input(self, q: int, x: Tensor, residual: Tensor) -> Tensor:
        masks = self.channel_masks
        return residual if masks is None or q >= len(masks) else x * masks[q]

    def _rows(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The input as [b, n, dim], and what is quantized of it."""
        flat = x.flatten(2).mT if self.accept_image_fmap else x
        flat = flat if mask is None else flat.masked_fill(~mask.unsqueeze(-1), 0.0)
        rows = self.project_in(flat).float()
        return flat, rows if mask is None else rows.masked_fill(~mask.unsqueeze(-1), 0.0)

    def _check(self, x: Any, mask: Any) -> None:
        name, wanted = type(self).__name__, 4 if self.accept_image_fmap else 3
        check_tensor(name, "x", x)
        check_tensor(name, "mask", mask, optional=True)
        if x.dim() != wanted or not x.is_floating_point():
            raise ValueError(
                f"{name}: x has shape {list(x.shape)} of {x.dtype} and must have {wanted} dimensions of floating point"
            )
        channels = x.shape[1 if self.accept_image_fmap else -1]
        if channels != self.dim:
            raise ValueError(f"{name}: x has {channels} channels and must have {self.dim}")
        if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != torch.bool or self.accept_image_fmap):
            raise ValueError(
                f"{name}: mask has shape {list(mask.shape)} of {mask.dtype} and must have {list(x.shape[:2])} of "
                f"torch.bool, for an x of [b, n, d]"
            )

    def _from_lengths(self, x: Tensor, mask: Tensor | None, lens: Tensor) -> Tensor:
        name = type(self).__name__
        if mask is not None:
            raise ValueError(f"{name}: lens is given beside mask, and must be None then")
        if lens.shape != x.shape[:1]:
            raise ValueError(f"{name}: lens has shape {list(lens.shape)} and must have {list(x.shape[:1])}")
        return torch.arange(x.shape[1], device=lens.device) < lens.unsqueeze(-1)

    def _dropout_stages(self, seed: int | None, device: torch.device) -> int:
        """How many stages a training step keeps."""
        if not (self.training and self.quantize_dropout):
            return self.num_quantizers
        draw = random.Random(synchronized_seed(device) if seed is None else seed)
        last = draw.randrange(self.quantize_dropout_cutoff_index, self.num_quantizers)
        multiple = self.quantize_dropout_multiple_of
        return min(-(-(last + 1) // multiple) * multiple, self.num_quantizers)

    # ---- public ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None, *, num_quantizers: int | None = None) -> Tensor:
        """The codes that forward gives in eval mode; with num_quantizers, of that many stages and at their cost."""
        self._check(x, mask)
        _, rows = self._rows(x, mask)
        stages = self.num_quantizers if num_quantizers is None else num_quantizers
        check_range(type(self).__name__, "num_quantizers", stages, 1, self.num_quantizers)
        codes = self._encode(rows, mask, stages, self.eval_beam_size or 1)
        return codes.unflatten(1, x.shape[2:]) if self.accept_image_fmap else codes

    def decode(self, codes: Tensor) -> Tensor:
        """What forward gives for these codes, [..., n] of the first n stages."""
        return self.get_output_from_indices(codes)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The vectors of each stage, [Q, ..., codebook_dim]; zeros for -1 and for stages that are not given."""
        check_tensor(type(self).__name__, "indices", indices)
        given = indices.shape[-1]
        if given > self.num_quantizers:
            raise ValueError(
                f"{type(self).__name__}: indices has {given} stages and must have at most {self.num_quantizers}"
            )
        each = [
            stage._codebook.lookup(indices[..., q, None])[..., 0, :] for q, stage in enumerate(self._stages[:given])
        ]
        if not each:
            return self._stages[0]._codebook.embed.new_zeros(
                self.num_quantizers, *indices.shape[:-1], self.codebook_dim
            )
        each += [torch.zeros_like(each[0])] * (self.num_quantizers - given)
        return torch.stack(each)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The sum of the codes, projected to dim. [..., n] gives [..., dim], for images too."""
        check_tensor(type(self).__name__, "indices", indices)
        out = ops.rvq_decode(indices, self._books())
        return self.project_out(out.to(next((p.dtype for p in self.project_out.parameters()), out.dtype)))

    def forward(
        self, x: Tensor, mask: Tensor | None = None, indices: None = None, return_all_codes: bool = False,
        sample_codebook_temp: None = None, freeze_codebook: bool | None = None, beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None, lens: Tensor | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Quantizes x, and learns from it in training.

        Args:
            x: [b, n, dim], or [b, dim, h, w]. Any floating-point dtype.
            mask: bool [b, n], the positions that count.
            indices: not available, nor is sample_codebook_temp.
            return_all_codes: adds the vectors of each stage, [Q, b, n, codebook_dim].
            freeze_codebook: learn nothing this time.
            beam_size: instead of the module's.
            rand_quantize_dropout_fixed_seed: draws the stages that are kept.
            lens: [b], instead of a mask: how many positions count.

        Returns:
            The quantized x in its dtype; int64 codes [b, n, Q], -1 at masked positions and for dropped stages; and the
            commitment losses [Q], zero in eval mode.
        """
        name = type(self).__name__
        given = {"indices": indices, "sample_codebook_temp": sample_codebook_temp}
        refuse(name, given, {"indices": None, "sample_codebook_temp": None})
        check_tensor(name, "lens", lens, optional=True)
        if lens is not None:
            mask = self._from_lengths(x, mask, lens)
        self._check(x, mask)
        beam = beam_size if beam_size is not None else self.beam_size if self.training else self.eval_beam_size
        stages = self._dropout_stages(rand_quantize_dropout_fixed_seed, x.device)
        flat, rows = self._rows(x, mask)
        codes = self._encode(rows, mask, stages, 1 if beam is None else beam)
        if self.training:
            quantized, losses = self._learn(x, rows, codes, mask, freeze_codebook)
        else:
            books = self._books()
            quantized = ops.rvq_decode(codes, books).detach()
            losses = [rows.new_zeros(())] * stages
        losses += [rows.new_zeros(())] * (self.num_quantizers - stages)
        codes = nn.functional.pad(codes, (0, self.num_quantizers - stages), value=-1)

        out = self.project_out(quantized.to(flat.dtype))
        if mask is not None:
            padding = torch.zeros_like(out) if self.return_zeros_for_masked_padding else x
            out = torch.where(mask.unsqueeze(-1), out, padding)
        if self.accept_image_fmap:
            out, codes = out.mT.unflatten(2, x.shape[2:]), codes.unflatten(1, x.shape[2:])
        result = (out, codes, torch.stack(losses))
        return (*result, self.get_codes_from_indices(codes)) if return_all_codes else result

    def _learn(
        self, x: Tensor, rows: Tensor, codes: Tensor, mask: Tensor | None, freeze: bool | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Stage by stage: the loss, the gradient's way, what the codebook takes along."""
        residual, total, losses, seen_rows, seen_codes = rows, None, [], [], []
        plain = not (self._stages[0].rotation_trick or self._stages[0].directional_reparam)
        shared = self._stages[0]._codebook if self.shared_codebook else None
        learned = False
        for q, (stage, of_stage) in enumerate(zip(self._stages, codes.unbind(-1), strict=False)):
            frozen = stage.freeze_codebook if freeze is None else freeze
            seen = stage._split(self._stage_input(q, rows, residual))
            of_stage = of_stage.unsqueeze(-1)
            code = stage._codebook.lookup(of_stage)
            loss = stage._commitment(seen, code, mask, frozen) if stage.has_commitment_loss else rows.new_zeros(())
            loss = loss * stage.commitment_weight
            if stage.orthogonal_reg_weight > 0:
                loss = loss + stage._orthogonal(of_stage) * stage.orthogonal_reg_weight
            losses.append(loss)
            routed = stage._routed(seen, code, x.requires_grad or rows.requires_grad)[..., 0, :]
            if not frozen:
                learned = True
                flat_rows, flat_codes = seen.detach().flatten(0, 1), of_stage.flatten(0, 1)
                stage._codebook.update(flat_rows, flat_codes, expire=shared is None)
                seen_rows.append(flat_rows)
                seen_codes.append(flat_codes)
            residual = residual - partial_gradient(routed, self.quant_grad_frac)
            total = routed if total is None else total + routed
        assert total is not None
        if self.diveq:
            total = directional(rows, total, self._stages[0].directional_reparam_variance)
        if shared is not None and learned:
            if shared.ema_update:
                shared.update_ema()
            shared.expire(torch.cat(seen_rows), torch.cat(seen_codes))
        if plain and rows.requires_grad and self._stages[0].route_gradients_to_input:
            once = straight_through(rows, total)
            total = once + (total - total.detach()) if self._stages[0].learnable_codebook else once
        return total, losses

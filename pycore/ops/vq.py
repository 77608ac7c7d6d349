# SPDX-License-Identifier: Apache-2.0
"""Vector quantization: nearest codes, residual quantization, the vectors of codes, and codebook statistics.

The matrix of distances never exists, and a row's codes depend on the row and the codebooks alone: fast scores leave out
what rounding cannot bring near, and the sum of squared differences, taken in one order, decides
(csrc/include/pycore/vq/vq.h). `torch.ops.pycore` has the ops (csrc/torch/vq.cpp), which run csrc/cpu/vq/dispatch.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pycore._checks import check_bool, check_int, check_str
from pycore._load import load_ops
from pycore._tensors import as_index, check_devices, check_tensor
from pycore.ops._autograd import register_derivatives

load_ops()

__all__ = ["rvq_decode", "rvq_encode", "vq_encode", "vq_rotate", "vq_statistics"]


def vq_encode(x: Tensor, codebook: Tensor, *, metric: str = "euclidean", topk: int = 1) -> Tensor:
    """The nearest codes of every row, the nearest first.

    Nearest in float32: by the sum of (x - c)^2 in one order of summation, ties to the lowest index, on every path and
    instruction set. Neither the other rows nor an offset of the data changes a code.

    Args:
        x: [..., D], or [..., C, D] for a batch of C codebooks. float32, bfloat16 or float16, widened to float32.
        codebook: [K, D], or [C, K, D]. The same dtypes; it need not have x's.
        metric: "euclidean", or "cosine": rows and codes are divided by their length first (zeros stay).
        topk: how many codes, 1 to K.

    Returns:
        int64 [..., topk], or [..., C, topk]. Nothing to differentiate.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit; NaN or an infinity in x or codebook; a row so
            far away that float32 does not hold its distance.
        TypeError: an argument of the wrong type.

    Example:
        >>> x, codebook = torch.randn(2, 50, 64), torch.randn(1024, 64)
        >>> codes = pycore.ops.vq_encode(x, codebook)[..., 0]
        >>> quantized = codebook[codes]
    """
    check_tensor("vq_encode", "x", x)
    check_tensor("vq_encode", "codebook", codebook)
    check_str("vq_encode", "metric", metric)
    check_int("vq_encode", "topk", topk)
    return torch.ops.pycore.vq_encode(x, codebook, metric, topk)


def rvq_encode(
    x: Tensor, codebooks: Tensor | Sequence[Tensor], *, num_quantizers: int | None = None, metric: str = "euclidean",
    beam_size: int = 1, channel_masks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The codes of residual quantization: every stage quantizes what the stages before it left, all in one pass.

    The residual is float32 throughout. A stage's code is the nearest, as `vq_encode` says.

    Args:
        x: [..., D], float32, bfloat16 or float16.
        codebooks: [Q, K, D], or Q codebooks [K_q, D] of sizes of their own.
        num_quantizers: how many stages to run, 1 to Q; the others cost nothing. None: all.
        metric: "euclidean", or "cosine", where what is left is compared by its direction.
        beam_size: 1 to 16. With more than one, as many partial results nearest to x go on to the next stage.
        channel_masks: [M, D], M <= Q, bool or float: the first M stages quantize x times their mask, each by itself
            and without a beam, and the residual starts after them, at x less their codes (Language-Codec's MCRVQ).

    Returns:
        int64 [..., num_quantizers or Q].

    Raises:
        ValueError: a shape, dtype, device or number that does not fit; NaN or an infinity in x or a codebook.
        TypeError: an argument of the wrong type.

    Source: Zeghidour et al., "SoundStream"; Ji et al., "Language-Codec" (masks); Babenko and Lempitsky, "Additive
        Quantization" (beam).
    """
    check_tensor("rvq_encode", "x", x)
    books, sizes = _stacked("rvq_encode", codebooks)
    check_int("rvq_encode", "beam_size", beam_size)
    check_str("rvq_encode", "metric", metric)
    if num_quantizers is not None:
        check_int("rvq_encode", "num_quantizers", num_quantizers)
    check_tensor("rvq_encode", "channel_masks", channel_masks, optional=True)
    masks = _as_masks(channel_masks)
    return torch.ops.pycore.rvq_encode(x, books, sizes, num_quantizers, metric, beam_size, masks)


def rvq_decode(
    codes: Tensor, codebooks: Tensor | Sequence[Tensor], *, channel_masks: Tensor | None = None
) -> Tensor:  # fmt: skip
    """The sum of the codes' vectors, stage after stage.

    Args:
        codes: [..., n] integers, n <= Q: stage q has -1 to K_q - 1, and -1 stands for zeros.
        codebooks: [Q, K, D], or Q codebooks [K_q, D]; float32, float64, bfloat16 or float16.
        channel_masks: as in `rvq_encode`, [M, D]. It is checked and changes nothing: a masked stage sees a part of x,
            but its code is taken whole, in encoding and decoding alike, as in Language-Codec.

    Returns:
        [..., D] in the codebooks' dtype; half precision is added in float32. Differentiable in codebooks, any number of
        times.

    Raises:
        IndexError: a code past the end, or less than -1.
        ValueError: a shape, dtype or device that does not fit.
        TypeError: an argument of the wrong type.
    """
    check_tensor("rvq_decode", "codes", codes)
    books, sizes = _stacked("rvq_decode", codebooks)
    check_tensor("rvq_decode", "channel_masks", channel_masks, optional=True)
    if channel_masks is not None:
        stages, channels = books.shape[0], books.shape[2]
        shape = channel_masks.shape
        if len(shape) != 2 or shape[1] != channels or shape[0] > stages:
            raise ValueError(
                f"rvq_decode: channel_masks has shape {list(shape)} and must be [at most {stages} stages, "
                f"{channels} channels]"
            )
    return torch.ops.pycore.rvq_decode(as_index(codes), books, sizes)


def vq_statistics(x: Tensor, codes: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    """How many rows have each code, and their sums: what codebooks are learned from.

    Sums are of float64, rows in order, rounded once: the same on every machine and with any number of threads. There is
    no one-hot matrix.

    Args:
        x: [..., D], float32, float64, bfloat16 or float16.
        codes: [...] integers, -1 to codebook_size - 1; -1 counts nowhere.
        codebook_size: K.

    Returns:
        counts [K] and sums [K, D], float32, or float64 for float64. sums is differentiable in x.

    Raises:
        IndexError: a code past the end, or less than -1.
        ValueError: a shape, dtype or device that does not fit.
        TypeError: an argument of the wrong type.
    """
    check_tensor("vq_statistics", "x", x)
    check_tensor("vq_statistics", "codes", codes)
    check_int("vq_statistics", "codebook_size", codebook_size)
    return torch.ops.pycore.vq_statistics(x, as_index(codes), codebook_size)


def vq_rotate(v: Tensor, x: Tensor, code: Tensor, *, transpose: bool = False) -> Tensor:
    """V turned and scaled as x is onto its code: the linear map of the rotation trick, which takes x to code.

    |code|/|x| (v - 2 (v w) w + 2 (v u) q), with u along x, q along code and w halfway between, all of length one.
    Lengths that divide are taken as 1e-6 where they are less. In sums of sixteen lanes, a row's bits its own.

    Args:
        v: [..., D], what is turned; float32 or float64.
        x, code: [..., D], of v's shape and dtype. They have no gradient: the trick takes the map as fixed.
        transpose: times the transposed matrix, as a gradient is.

    Returns:
        [..., D]. Differentiable in v, any number of times.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
        TypeError: an argument of the wrong type.

    Source: Fifty et al., arXiv 2410.06424, section 4.2.
    """
    for name, tensor in (("v", v), ("x", x), ("code", code)):
        check_tensor("vq_rotate", name, tensor)
    check_bool("vq_rotate", "transpose", transpose)
    return torch.ops.pycore.vq_rotate(v, x, code, transpose)


def _stacked(op: str, codebooks: Any) -> tuple[Tensor, list[int] | None]:
    """Codebooks as [Q, K, D], and how many codes of each count where that is not all."""
    if not isinstance(codebooks, list | tuple | torch.nn.ParameterList):
        check_tensor(op, "codebooks", codebooks)
        return codebooks, None
    if not len(codebooks):
        raise ValueError(f"{op}: codebooks has no stages and must have one at least")
    for q, codebook in enumerate(codebooks):
        check_tensor(op, f"codebooks[{q}]", codebook)
        first = codebooks[0]
        if codebook.dim() != 2:
            raise ValueError(f"{op}: codebooks[{q}] has shape {list(codebook.shape)} and must be [codes, channels]")
        if not codebook.shape[0]:
            raise ValueError(f"{op}: codebooks[{q}] has shape {list(codebook.shape)} and must have a code")
        if codebook.shape[1] != first.shape[1]:
            raise ValueError(
                f"{op}: codebooks[{q}] has {codebook.shape[1]} channels and must have {first.shape[1]}, as codebooks[0]"
            )
        if codebook.dtype != first.dtype or codebook.device != first.device:
            raise ValueError(
                f"{op}: codebooks[{q}] is {codebook.dtype} on {codebook.device} and must be {first.dtype} on "
                f"{first.device}, as codebooks[0]"
            )
    sizes = [codebook.shape[0] for codebook in codebooks]
    if all(size == sizes[0] for size in sizes):
        return torch.stack(list(codebooks)), None
    return torch.nn.utils.rnn.pad_sequence(list(codebooks), batch_first=True), sizes


def _as_masks(channel_masks: Tensor | None) -> Tensor | None:
    if channel_masks is None or channel_masks.dtype not in (torch.bool, torch.float16, torch.bfloat16, torch.float64):
        return channel_masks
    return channel_masks.float()


# ---- fake kernels ----------------------------------------------------------------------------------------------------


@torch.library.register_fake("pycore::vq_encode")
def _encode_fake(x: Tensor, codebook: Tensor, metric: str, topk: int) -> Tensor:
    check_devices("vq_encode", x=x, codebook=codebook)
    return x.new_empty((*x.shape[:-1], topk), dtype=torch.int64)


@torch.library.register_fake("pycore::rvq_encode")
def _rvq_encode_fake(
    x: Tensor, codebooks: Tensor, sizes: list[int] | None, num_quantizers: int | None, metric: str, beam_size: int,
    channel_masks: Tensor | None,
) -> Tensor:  # fmt: skip
    check_devices("rvq_encode", x=x, codebooks=codebooks, channel_masks=channel_masks)
    stages = codebooks.shape[0] if num_quantizers is None else num_quantizers
    return x.new_empty((*x.shape[:-1], stages), dtype=torch.int64)


@torch.library.register_fake("pycore::rvq_decode")
def _decode_fake(codes: Tensor, codebooks: Tensor, sizes: list[int] | None) -> Tensor:
    check_devices("rvq_decode", codebooks=codebooks, codes=codes)
    return codebooks.new_empty((*codes.shape[:-1], codebooks.shape[-1]))


@torch.library.register_fake("pycore::vq_statistics")
def _statistics_fake(x: Tensor, codes: Tensor, codebook_size: int) -> tuple[Tensor, Tensor]:
    check_devices("vq_statistics", x=x, codes=codes)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((codebook_size,), dtype=dtype), x.new_empty((codebook_size, x.shape[-1]), dtype=dtype)


@torch.library.register_fake("pycore::vq_rotate")
def _rotate_fake(v: Tensor, x: Tensor, code: Tensor, transpose: bool) -> Tensor:
    check_devices("vq_rotate", v=v, x=x, code=code)
    return v.new_empty(v.shape)


# ---- autograd: all are linear. rvq_decode and vq_statistics are each other's transpose; vq_rotate has a flag ---------


def _decode_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    codes, codebooks, _ = inputs
    ctx.save_for_backward(codes)
    ctx.shape, ctx.dtype = codebooks.shape, codebooks.dtype


def _decode_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (codes,) = ctx.saved_tensors
    stages, most, channels = ctx.shape
    sums = [torch.ops.pycore.vq_statistics(grad, stage, most)[1] for stage in codes.unbind(-1)]
    sums += [grad.new_zeros(most, channels, dtype=torch.float64 if ctx.dtype == torch.float64 else torch.float32)] * (
        stages - len(sums)
    )
    return None, torch.stack(sums).to(ctx.dtype), None


def _decode_jvp(inputs: Sequence[Any], tangents: list[Tensor | None], output: Tensor) -> Tensor:
    codes, _, sizes = inputs
    assert tangents[1] is not None
    return torch.ops.pycore.rvq_decode(codes, tangents[1], sizes)


def _statistics_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, codes, _ = inputs
    ctx.save_for_backward(codes)
    ctx.dtype = x.dtype


def _statistics_backward(ctx: Any, grad_counts: Tensor | None, grad_sums: Tensor | None) -> tuple[Tensor | None, ...]:
    (codes,) = ctx.saved_tensors
    if grad_sums is None:
        return None, None, None
    grad = torch.ops.pycore.rvq_decode(codes.unsqueeze(-1), grad_sums.unsqueeze(0), None)
    return grad.to(ctx.dtype), None, None


def _statistics_jvp(
    inputs: Sequence[Any], tangents: list[Tensor | None], output: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    _, codes, codebook_size = inputs
    assert tangents[0] is not None
    _, sums = torch.ops.pycore.vq_statistics(tangents[0], codes, codebook_size)
    return torch.zeros_like(output[0]), sums


def _rotate_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, code, ctx.transpose = inputs
    ctx.save_for_backward(x, code)


def _rotate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, code = (saved.detach() for saved in ctx.saved_tensors)
    return torch.ops.pycore.vq_rotate(grad, x, code, not ctx.transpose), None, None, None


def _rotate_jvp(inputs: Sequence[Any], tangents: list[Tensor | None], output: Tensor) -> Tensor:
    _, x, code, transpose = inputs
    if tangents[0] is None:
        return torch.zeros_like(output)
    return torch.ops.pycore.vq_rotate(tangents[0], x, code, transpose)


register_derivatives("rvq_decode", _decode_backward, _decode_setup, _decode_jvp)
register_derivatives("vq_statistics", _statistics_backward, _statistics_setup, _statistics_jvp)
register_derivatives("vq_rotate", _rotate_backward, _rotate_setup, _rotate_jvp)


# ---- vmap ------------------------------------------------------------------------------------------------------------


def _one_by_one(op: Callable[..., Any], batch: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
    """Samples run one after another. Where there are none, one of zeros says what their results' shapes would be."""
    given = list(zip(args, in_dims, strict=True))
    if batch == 0:
        shapes = [
            arg if not isinstance(dim, int) else arg.new_zeros(arg.movedim(dim, 0).shape[1:]) for arg, dim in given
        ]
        result = op(*shapes)
        if isinstance(result, Tensor):
            return result.new_empty(0, *result.shape), 0
        return tuple(x.new_empty(0, *x.shape) for x in result), (0,) * len(result)
    samples = [op(*(arg.select(dim, i) if isinstance(dim, int) else arg for arg, dim in given)) for i in range(batch)]
    if isinstance(samples[0], Tensor):
        return torch.stack(samples), 0
    return tuple(torch.stack(results) for results in zip(*samples, strict=True)), (0,) * len(samples[0])


def _register_vmap(name: str, rows: bool) -> None:
    """With `rows`, a batch of the first argument alone is more of its rows."""
    op = getattr(torch.ops.pycore, name)

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        if rows and isinstance(in_dims[0], int) and not any(isinstance(dim, int) for dim in in_dims[1:]):
            return op(args[0].movedim(in_dims[0], 0), *args[1:]), 0
        return _one_by_one(op, info.batch_size, in_dims, args)

    torch.library.register_vmap(f"pycore::{name}", rule)


_register_vmap("vq_encode", rows=True)
_register_vmap("rvq_encode", rows=True)
_register_vmap("rvq_decode", rows=True)
_register_vmap("vq_statistics", rows=False)


def _rotate_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    """A batch is more rows; what has none is every sample's."""
    *given, transpose = args
    rows = [
        arg.movedim(dim, 0) if isinstance(dim, int) else arg.expand(info.batch_size, *arg.shape)
        for arg, dim in zip(given, in_dims, strict=False)
    ]
    return torch.ops.pycore.vq_rotate(*rows, transpose), 0


torch.library.register_vmap("pycore::vq_rotate", _rotate_vmap)

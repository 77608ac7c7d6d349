# SPDX-License-Identifier: Apache-2.0
"""torchac's four functions, on pycore's kernels: the same bytes, read and written, without a compiler at import.

Strided and expanded cdfs are coded as what they are (torchac takes their memory for contiguous). The format has no
frame and no checksum: damage inside a stream goes unseen, and symbols come out that were never coded. Where the other
end need not be torchac, use `pycore.ops.ac_encode`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycore import _load
from pycore._checks import check_bool
from pycore._tangents import refuse_tangents
from pycore._tensors import check_tensor, short_name
from pycore.ops import arithmetic_coding_rules  # noqa: F401 - it loads the ops

__all__ = ["decode_float_cdf", "decode_int16_normalized_cdf", "encode_float_cdf", "encode_int16_normalized_cdf"]

_BitstreamError: type[ValueError] = _load.native().BitstreamError


def encode_float_cdf(
    cdf_float: Tensor, sym: Tensor, needs_normalization: bool = True, check_input_bounds: bool = False
) -> bytes:
    """Codes sym with cumulative distributions in floating point.

    Args:
        cdf_float: [..., V + 1], float32 in [0, 1], any strides, on the CPU; V is at most 32767.
        sym: [...], int16.
        needs_normalization: spread the rows over 2^16 - V and add one count a symbol, so that every symbol can be
            coded. Otherwise rows are only scaled to 2^16.
        check_input_bounds: of no effect: symbols and rows are always checked.

    Returns:
        The stream.

    Raises:
        ValueError: NaN or values outside [0, 1], a row that falls, a symbol without a share, shapes or dtypes that do
            not fit.
        IndexError: a symbol that the cdf does not have.
        TypeError: an argument that is no tensor.
    """
    return encode_int16_normalized_cdf(_integers("encode_float_cdf", cdf_float, needs_normalization), sym)


def decode_float_cdf(cdf_float: Tensor, byte_stream: bytes, needs_normalization: bool = True) -> Tensor:
    """Inverse of `encode_float_cdf`: int16 [...]; errors as there and in `decode_int16_normalized_cdf`."""
    return decode_int16_normalized_cdf(_integers("decode_float_cdf", cdf_float, needs_normalization), byte_stream)


def encode_int16_normalized_cdf(cdf_int: Tensor, sym: Tensor) -> bytes:
    """Codes sym with cumulative frequencies of 16 bits.

    Args:
        cdf_int: [..., V + 1], int16 with the bits of uint16, any strides, on the CPU. The last entry is taken to be
            2^16.
        sym: [...], int16.

    Returns:
        The stream.

    Raises:
        ValueError, IndexError, TypeError: as `encode_float_cdf`.
    """
    op = "encode_int16_normalized_cdf"
    _check_tensors(op, cdf_int=cdf_int, sym=sym)
    if sym.dtype != torch.int16:
        raise ValueError(f"{op}: sym has dtype {short_name(sym.dtype)} and must have int16")
    return torch.ops.pycore.torchac_encode(cdf_int, sym).numpy().tobytes()


def decode_int16_normalized_cdf(cdf_int: Tensor, byte_stream: bytes) -> Tensor:
    """Inverse of `encode_int16_normalized_cdf`: int16 [...].

    Raises:
        BitstreamError: a stream with bytes after its end, or one that no symbols of cdf_int give; most that are cut
        short. ValueError, TypeError: as `encode_float_cdf`.
    """
    op = "decode_int16_normalized_cdf"
    _check_tensors(op, cdf_int=cdf_int)
    if not isinstance(byte_stream, bytes | bytearray | memoryview):
        raise TypeError(f"{op}: byte_stream is a {type(byte_stream).__name__} and must be bytes")
    joined = bytearray(byte_stream)
    data = torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
    # torch turns every std::invalid_argument into a ValueError, and only sentences about the stream begin like this.
    try:
        return torch.ops.pycore.torchac_decode(cdf_int, data)
    except ValueError as error:
        if str(error).startswith("torchac_decode: byte_stream "):
            raise _BitstreamError(str(error)) from None
        raise


def _integers(op: str, cdf: Any, needs_normalization: bool) -> Tensor:
    """Cumulative frequencies, rounded to the nearest integer, ties to even; 2^16 becomes 0."""
    _check_tensors(op, cdf_float=cdf)
    check_bool(op, "needs_normalization", needs_normalization)
    if cdf.dtype != torch.float32:
        raise ValueError(f"{op}: cdf_float has dtype {short_name(cdf.dtype)} and must have float32")
    if cdf.dim() < 1 or cdf.shape[-1] < 2:
        raise ValueError(f"{op}: cdf_float has shape {list(cdf.shape)} and must be [..., symbols + 1]")
    if cdf.numel() and not bool(((cdf >= 0) & (cdf <= 1)).all()):
        raise ValueError(f"{op}: cdf_float has NaN or values outside [0, 1] and must not")
    symbols = cdf.shape[-1] - 1
    scaled = cdf.mul((1 << 16) - (symbols if needs_normalization else 0)).round().to(torch.int32)
    if needs_normalization:
        scaled += torch.arange(symbols + 1, dtype=torch.int32)
    return scaled.to(torch.int16)


def _check_tensors(op: str, **tensors: Any) -> None:
    for name, tensor in tensors.items():
        check_tensor(op, name, tensor)
        if tensor.is_meta:
            raise ValueError(f"{op}: {name} is on meta, which has no data, and must be on the CPU")
    refuse_tangents(op, **tensors)

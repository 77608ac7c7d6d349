# SPDX-License-Identifier: Apache-2.0
"""Arithmetic coding: distributions as integers, and streams of symbols coded with them.

Everything is integer arithmetic from the quantized distribution on (coder_math.h in
csrc/include/pycore/arithmetic_coding), so a stream decodes on any machine; docs/formats.md writes the format down,
docs/ops/arithmetic_coding.md says how fast it is and why. `torch.ops.pycore` has the ops
(csrc/torch/arithmetic_coding.cpp), which run csrc/cpu/arithmetic_coding/dispatch.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pycore import _load
from pycore._checks import check_int, check_whole
from pycore._tangents import refuse_tangents
from pycore._tensors import check_devices, check_tensor
from pycore.coding.bitstreams import Bitstreams
from pycore.ops import arithmetic_coding_rules  # noqa: F401 - it registers the ops' rules

_load.load_ops()

__all__ = [
    "ac_decode",
    "ac_decode_bytes",
    "ac_decode_logits",
    "ac_encode",
    "ac_encode_bytes",
    "ac_encode_logits",
    "quantize_cdf",
]

_BitstreamError: type[ValueError] = _load.native().BitstreamError


def quantize_cdf(probs: Tensor | None = None, *, logits: Tensor | None = None, precision: int | None = 16) -> Tensor:
    """Integer cumulative frequencies: cdf[i] = i + floor(C[i] (2^precision - V) / C[V]), C the running sum of counts.

    Counts are integers, so the same input gives the same cdf on every device. A probability's count is
    floor(p 2^(30 - e)), where 2^e is the power of two at or below the row's largest; probabilities need not sum to one.
    A logit goes onto a grid of sixteen points an octave, round(16 log2(e) x), and its count is a table entry shifted by
    the octaves below the row's highest. docs/formats.md has the rules to the bit. Every symbol gets at least one of the
    2^precision, so everything can be coded.

    Args:
        probs: [..., V], float32, float64, float16 or bfloat16, on the CPU, any strides; finite and not negative.
        logits: the same in place of probs. -inf is a symbol that gets no more than the least share. float64 is rounded
            to float32 first.
        precision: 1 to 24; V is at most 2^precision. None chooses by V: the least from 16 on at which the shares of one
            take 2^-14 of the whole, or less, which is 22 for 256 symbols; 24 from 513 symbols on.

    Returns:
        int32 [..., V + 1], contiguous: 0 first, 2^precision last, rising.

    Raises:
        ValueError: NaN, infinity, a negative probability, a row without mass; a shape, dtype or precision that does not
            fit; both or neither of probs and logits.
        TypeError: what is given is no tensor.

    Example:
        >>> cdf = pycore.ops.quantize_cdf(torch.tensor([0.5, 0.25, 0.25]), precision=4)
        >>> cdf
        tensor([ 0,  7, 11, 16], dtype=torch.int32)
    """
    if (probs is None) == (logits is None):
        given = "neither" if probs is None else "both"
        raise ValueError(f"quantize_cdf: {given} of probs and logits is given and one of them must be")
    values, name = (logits, "logits") if probs is None else (probs, "probs")
    _check_tensors("quantize_cdf", **{name: values})
    if precision is not None:
        check_int("quantize_cdf", "precision", precision)
    return torch.ops.pycore.quantize_cdf(values, probs is None, precision)


def ac_encode(symbols: Tensor, cdf: Tensor, *, model_id: int | None = None, lanes: int = 1) -> Bitstreams:
    """Codes each row of symbols into a stream of its own, with a cdf for each symbol or one for many.

    The payload is within 0.01 % + 8 bytes of the sum of -log2 (share of the symbol); a frame of 32 bytes before it lets
    decoding report what is wrong with a stream. A stream's bytes depend on its symbols and shares alone: not on the
    batch, the threads, the strides, the dtypes or the instruction set.

    Args:
        symbols: [streams, length], any integer dtype, any strides, on the CPU.
        cdf: broadcasts to [streams, length, V + 1] (as `quantize_cdf` gives it; any strides, expanded or not): int32,
            ending in one power of two up to 2^24; or uint16, ending in 2^16, which uint16 holds as 0 and
            only there. A row must rise,
            but may give some symbols nothing; those cannot be coded.
        model_id: 0 to 2^63 - 1, kept in the stream in place of the fingerprint of the row that codes its first symbol.
            Decoding compares it.
        lanes: 1 to 64. With more than one, symbol i is coded in lane i mod lanes of its stream, which costs up to 8
            bytes a lane and makes decoding with one cdf for all symbols several times faster.

    Returns:
        The streams.

    Raises:
        IndexError: a symbol that is no symbol of the cdf; the sentence names it.
        ValueError: a symbol that the cdf gives no share, a row that is no cumulative distribution, a shape or dtype
            that does not fit.
        TypeError: an argument that is no tensor.

    Source: Martin, "Range encoding", 1979; Witten, Neal and Cleary, "Arithmetic coding for data compression", 1987.

    Example:
        >>> symbols = torch.randint(3, (2, 100))
        >>> cdf = pycore.ops.quantize_cdf(torch.tensor([0.5, 0.25, 0.25]))
        >>> streams = pycore.ops.ac_encode(symbols, cdf)
        >>> torch.equal(pycore.ops.ac_decode(streams, cdf), symbols)
        True
    """
    _check_tensors("ac_encode", symbols=symbols, cdf=cdf)
    check_int("ac_encode", "lanes", lanes)
    _check_model_id("ac_encode", model_id)
    return Bitstreams(*torch.ops.pycore.ac_encode(symbols, cdf, model_id, lanes))


def ac_decode(streams: Bitstreams, cdf: Tensor, *, model_id: int | None = None) -> Tensor:
    """Inverse of `ac_encode`, or a BitstreamError: a stream is never decoded into symbols that were not coded.

    Args:
        streams: as `ac_encode` returned them, or `Bitstreams.from_bytes` did; all of one length.
        cdf: what the streams were coded with, in any layout that broadcasts to [streams, length, V + 1].
        model_id: what `ac_encode` was given.

    Returns:
        int64 [streams, length], contiguous.

    Raises:
        BitstreamError: a stream that is truncated, damaged, extended, of another format or version, or coded with
            another cdf or model_id. Under torch.compile it is a ValueError with the same sentence.
        ValueError: streams of different lengths, a row that is no cumulative distribution, a shape or dtype that does
            not fit.
        TypeError: streams is no Bitstreams, or cdf no tensor.
    """
    _check_streams("ac_decode", streams)
    _check_tensors("ac_decode", streams=streams.data, cdf=cdf)
    _check_model_id("ac_decode", model_id)
    return _decoded("ac_decode", torch.ops.pycore.ac_decode, streams.data, streams.offsets, cdf, model_id)


def ac_encode_logits(
    symbols: Tensor, logits: Tensor, *, precision: int | None = 16, model_id: int | None = None
) -> Bitstreams:
    """The bytes of ac_encode(symbols, quantize_cdf(logits=logits, precision=precision)), without the cdf in memory.

    Args:
        symbols: as for `ac_encode`.
        logits: broadcasts to [streams, length, V]; as for `quantize_cdf`.
        precision: as for `quantize_cdf`.
        model_id: as for `ac_encode`.

    Returns:
        The streams, which `ac_decode_logits`, and `ac_decode` with the cdf, decode.

    Raises:
        IndexError, ValueError, TypeError: as `ac_encode` and `quantize_cdf`.
    """
    _check_tensors("ac_encode_logits", symbols=symbols, logits=logits)
    if precision is not None:
        check_int("ac_encode_logits", "precision", precision)
    _check_model_id("ac_encode_logits", model_id)
    return Bitstreams(*torch.ops.pycore.ac_encode_logits(symbols, logits, precision, model_id))


def ac_decode_logits(
    streams: Bitstreams, logits: Tensor, *, precision: int | None = 16, model_id: int | None = None
) -> Tensor:
    """Inverse of `ac_encode_logits`, for logits that are known for all positions.

    Where the logits of a position depend on the symbols before it, decode with `pycore.ArithmeticDecoder` and
    `quantize_cdf`, a symbol at a time; the streams are the same.

    Args:
        streams: as for `ac_decode`.
        logits: broadcasts to [streams, length, V]; the very numbers the streams were coded with, up to rounding errors
            that leave every logit on its point of the grid.
        precision: as for `quantize_cdf`.
        model_id: as for `ac_decode`.

    Returns:
        int64 [streams, length], contiguous.

    Raises:
        BitstreamError, ValueError, TypeError: as `ac_decode` and `quantize_cdf`.
    """
    _check_streams("ac_decode_logits", streams)
    _check_tensors("ac_decode_logits", streams=streams.data, logits=logits)
    if precision is not None:
        check_int("ac_decode_logits", "precision", precision)
    _check_model_id("ac_decode_logits", model_id)
    op = torch.ops.pycore.ac_decode_logits
    return _decoded("ac_decode_logits", op, streams.data, streams.offsets, logits, precision, model_id)


def ac_encode_bytes(data: Tensor, *, order: int = 0) -> Bitstreams:
    """Codes each row of bytes with a model that learns from it as it goes: no distributions are given or stored.

    A byte is coded as two symbols of four bits, whose distributions move towards what was coded. Every stream starts
    afresh, so its bytes are its own.

    Args:
        data: uint8 [streams, length], any strides, on the CPU.
        order: 0 learns how often bytes are, 1 how often they are after each byte.

    Returns:
        The streams, for `ac_decode_bytes`, which reads the order from them.

    Raises:
        ValueError: a shape, dtype or order that does not fit.
        TypeError: data is no tensor, or order no int.
    """
    _check_tensors("ac_encode_bytes", data=data)
    check_int("ac_encode_bytes", "order", order)
    return Bitstreams(*torch.ops.pycore.ac_encode_bytes(data, order))


def ac_decode_bytes(streams: Bitstreams) -> Tensor:
    """Inverse of `ac_encode_bytes`: uint8 [streams, length]; streams all of one length.

    Raises:
        BitstreamError, ValueError, TypeError: as `ac_decode`.
    """
    _check_streams("ac_decode_bytes", streams)
    return _decoded("ac_decode_bytes", torch.ops.pycore.ac_decode_bytes, streams.data, streams.offsets)


def _decoded(name: str, op: Callable[..., Tensor], *args: Any) -> Tensor:
    # torch turns every std::invalid_argument into a ValueError, and only sentences about streams begin like this.
    try:
        return op(*args)
    except ValueError as error:
        if str(error).startswith(f"{name}: streams["):
            raise _BitstreamError(str(error)) from None
        raise


def _check_tensors(op: str, **tensors: Any) -> None:
    for name, tensor in tensors.items():
        check_tensor(op, name, tensor)
    refuse_tangents(op, **tensors)
    if any(tensor.is_meta for tensor in tensors.values()):
        check_devices(op, **tensors)


def _check_streams(op: str, streams: Any) -> None:
    if not isinstance(streams, Bitstreams):
        raise TypeError(f"{op}: streams is a {type(streams).__name__} and must be a Bitstreams")


def _check_model_id(op: str, model_id: Any) -> None:
    if model_id is None:
        return
    check_whole(op, "model_id", model_id)
    if not 0 <= model_id < 1 << 63:
        raise ValueError(f"{op}: model_id is {model_id} and must be 0 to 2^63 - 1")

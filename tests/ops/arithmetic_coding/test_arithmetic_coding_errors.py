# SPDX-License-Identifier: Apache-2.0
"""The coder's refusals: every truncation and every flipped bit of a stream, foreign models, and each bad argument."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

import pycore
from pycore import BitstreamError, Bitstreams, ops
from pycore.reference import arithmetic_coding as reference
from tests.support.coder_inputs import random_cdf

CDF = ops.quantize_cdf(torch.tensor([0.5, 0.2, 0.2, 0.1]))
SYMBOLS = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 0, 3, 2, 1, 0, 0, 0, 3], [3] * 15])


def decode_bytes(stream: bytes, cdf: torch.Tensor = CDF) -> torch.Tensor:
    return ops.ac_decode(Bitstreams.from_bytes([stream]), cdf)


def read_slowly(stream: bytes, cdf: torch.Tensor = CDF) -> list[int]:
    decoder = pycore.ArithmeticDecoder(stream)
    symbols = [decoder.decode(cdf) for _ in range(len(decoder))]
    decoder.finish()
    return symbols


@pytest.mark.parametrize("lanes", [1, 3])
def test_every_truncation(isa: str, lanes: int) -> None:
    for stream in ops.ac_encode(SYMBOLS, CDF, lanes=lanes).to_bytes():
        for length in range(len(stream)):
            with pytest.raises(BitstreamError, match=r"^ac_decode: streams\[0\] is truncated$"):
                decode_bytes(stream[:length])
            with pytest.raises(BitstreamError):
                pycore.ArithmeticDecoder(stream[:length])


@pytest.mark.parametrize("lanes", [1, 3])
def test_every_flipped_bit(isa: str, lanes: int) -> None:
    for stream in ops.ac_encode(SYMBOLS, CDF, lanes=lanes).to_bytes():
        for bit in range(8 * len(stream)):
            damaged = bytearray(stream)
            damaged[bit // 8] ^= 1 << bit % 8
            with pytest.raises(BitstreamError, match=r"^ac_decode: streams\[0\] "):
                decode_bytes(bytes(damaged))
            with pytest.raises(BitstreamError, match="^ArithmeticDecoder: data "):
                pycore.ArithmeticDecoder(bytes(damaged))


def test_bytes_after_the_end() -> None:
    for stream in ops.ac_encode(SYMBOLS, CDF).to_bytes():
        for tail in (b"\0", b"\xff", bytes(100), stream):
            with pytest.raises(BitstreamError, match=r"^ac_decode: streams\[0\] has bytes after its end$"):
                decode_bytes(stream + tail)
            with pytest.raises(BitstreamError, match="^ArithmeticDecoder: data has bytes after its end$"):
                pycore.ArithmeticDecoder(stream + tail)


def forged(stream: bytes, offset: int, value: bytes) -> bytes:
    """Another frame under a checksum that holds."""
    changed = stream[:offset] + value + stream[offset + len(value) :]
    crc = reference.crc32c(changed[:4] + changed[8:])
    return changed[:4] + crc.to_bytes(4, "little") + changed[8:]


@pytest.mark.parametrize(
    ("offset", "value", "sentence"),
    [
        (0, b"\xab", "is no stream of pycore"),
        (1, b"\x02", "has format version 2, and this library reads 1 to 1"),
        (2, b"\x01", r"is of another kind \(1\), which another decoder reads"),
        (2, b"\x7f", "is no stream of pycore"),
        (3, b"\x00", "is no stream of pycore"),
        (3, b"\x41", "is no stream of pycore"),
        (3, b"\x40", "is no stream of pycore"),  # 64 lanes, whose lengths have no room
        (8, b"\x00\x00\x00\x00", "was coded with other distributions: the symbols' checksum does not hold"),
        (12, b"\x00\x00", "was coded with another model"),
        (20, b"\x0e", "was coded with other distributions: the symbols' checksum does not hold"),
        (20, b"\x10", "was coded with other distributions: the symbols' checksum does not hold"),
        (26, b"\x00", "has bytes after its end"),
        (26, b"\x7f", "is truncated"),
    ],
)
def test_frames_that_lie(isa: str, offset: int, value: bytes, sentence: str) -> None:
    stream = forged(ops.ac_encode(SYMBOLS, CDF).to_bytes()[0], offset, value)
    with pytest.raises(BitstreamError, match=rf"^ac_decode: streams\[0\] {sentence}$"):
        decode_bytes(stream)


def test_any_payload_under_a_checksum_that_holds(isa: str) -> None:
    """Random payloads decode to something whose checksum does not hold; nothing else happens."""
    stream = ops.ac_encode(SYMBOLS, CDF).to_bytes()[0]
    each = CDF.expand(15, 5).contiguous()
    for payload in (b"", b"\xff" * 40, b"\0" * 40, *(bytes(torch.randint(256, (9,)).tolist()) for _ in range(50))):
        changed = stream[:26] + len(payload).to_bytes(6, "little") + payload
        for cdf in (CDF, each):
            with pytest.raises(BitstreamError, match="was coded with other distributions"):
                decode_bytes(forged(changed, 0, b"\xac"), cdf)


def test_any_long_payload_under_a_checksum_that_holds(isa: str) -> None:
    """Noise of 200 bytes in one stream, with models whose last symbols have no share: refused, whatever it is."""
    generator = torch.Generator().manual_seed(5)
    cdf = torch.tensor([0, 3, 40_000, 40_000, 65_536, 65_536], dtype=torch.int32)
    stream = ops.ac_encode(torch.randint(2, (1, 400), generator=generator), cdf).to_bytes()[0]
    for _ in range(300):
        payload = bytes(torch.randint(256, (200,), generator=generator).tolist())
        if payload[0] % 3 == 0:
            payload = b"\xff" * 8 + payload[8:]
        changed = forged(stream[:32] + payload, 26, len(payload).to_bytes(6, "little"))
        with pytest.raises(BitstreamError, match="was coded with other distributions"):
            decode_bytes(changed, cdf)


def test_another_model() -> None:
    streams = ops.ac_encode(SYMBOLS, CDF)
    other = CDF.clone()
    other[2] += 1
    with pytest.raises(BitstreamError, match=r"streams\[0\] was coded with another model"):
        ops.ac_decode(streams, other)
    with pytest.raises(BitstreamError, match="was coded with another model"):
        ops.ac_decode(streams, CDF, model_id=1)
    named = ops.ac_encode(SYMBOLS, CDF, model_id=1)
    for model_id in (None, 0, 2):
        with pytest.raises(BitstreamError, match="was coded with another model"):
            ops.ac_decode(named, CDF, model_id=model_id)
    with pytest.raises(BitstreamError, match="was coded with other distributions"):
        ops.ac_decode(named, CDF[-1] - CDF.flip(0), model_id=1)
    # The fingerprint is of the first row; another later row is seen by the symbols' checksum.
    each = CDF.expand(15, 5).clone()
    each[1] = torch.tensor([0, 1, 2, 3, 65536])
    with pytest.raises(BitstreamError, match=r"streams\[0\] was coded with other distributions"):
        ops.ac_decode(streams, each)
    with pytest.raises(BitstreamError, match=r"^ac_decode_logits: streams\[0\] was coded with another model"):
        ops.ac_decode_logits(streams, torch.randn(4))


def test_the_stream_at_fault_is_named() -> None:
    parts = ops.ac_encode(SYMBOLS[0].expand(9, 15), CDF).to_bytes()
    parts[7] = parts[7][:-1] + bytes([parts[7][-1] ^ 1])
    with pytest.raises(BitstreamError, match=r"streams\[7\] is damaged: its checksum does not hold"):
        ops.ac_decode(Bitstreams.from_bytes(parts), CDF)
    parts[7] = ops.ac_encode(SYMBOLS[:1], random_cdf(4)).to_bytes()[0]
    with pytest.raises(BitstreamError, match=r"streams\[7\] was coded with another model"):
        ops.ac_decode(Bitstreams.from_bytes(parts), CDF)


def test_compiled_code_says_it_too() -> None:
    streams = ops.ac_encode(SYMBOLS, CDF)
    compiled = torch.compile(lambda d: ops.ac_decode(Bitstreams(d, streams.offsets), CDF), backend="aot_eager")
    assert torch.equal(compiled(streams.data), SYMBOLS)
    with pytest.raises(ValueError, match=r"ac_decode: streams\[0\] is no stream of pycore"):
        compiled(torch.zeros_like(streams.data))


def test_error_is_a_value_error() -> None:
    assert issubclass(BitstreamError, ValueError) and BitstreamError is pycore.native.BitstreamError
    assert BitstreamError.__doc__


# ---- arguments -------------------------------------------------------------------------------------------------------

P = torch.tensor([0.5, 0.25, 0.25])
BAD_ROWS = torch.tensor([[0.5, 0.5], [0.1, math.nan], [1.0, -1.0]])
STREAMS = ops.ac_encode(SYMBOLS, CDF)
FALLING = torch.tensor([0, 9, 8, 20, 65536], dtype=torch.int32)
GAP = torch.tensor([0, 9, 9, 20, 65536], dtype=torch.int32)
EACH = CDF.expand(2, 15, 5).clone()
EACH[1, 4] = FALLING
LATE = CDF.expand(15, 5).clone()
LATE[3] = GAP


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: ops.quantize_cdf(), ValueError, "quantize_cdf: neither of probs and logits is given and one of"),
        (lambda: ops.quantize_cdf(P, logits=P), ValueError, "quantize_cdf: both of probs and logits is given and one"),
        (lambda: ops.quantize_cdf([0.5, 0.5]), TypeError, "quantize_cdf: probs is a list and must be a Tensor"),
        (lambda: ops.quantize_cdf(logits=3), TypeError, "quantize_cdf: logits is a int and must be a Tensor"),
        (lambda: ops.quantize_cdf(P, precision=16.0), TypeError, "precision is a float and must be an int"),
        (lambda: ops.quantize_cdf(P, precision=0), ValueError, "precision is 0 and must be 1 to 24"),
        (lambda: ops.quantize_cdf(P, precision=25), ValueError, "precision is 25 and must be 1 to 24"),
        (lambda: ops.quantize_cdf(P, precision=1), ValueError, "probs has 3 symbols, and precision 1 has room for 2"),
        (lambda: ops.quantize_cdf(P.int()), ValueError, "probs has dtype int32 and must have float32, float64, flo"),
        (lambda: ops.quantize_cdf(P[0]), ValueError, r"probs is a scalar and must have shape \[..., symbols\]"),
        (lambda: ops.quantize_cdf(P[:0]), ValueError, "probs has 0 entries in its last dimension and must have at lea"),
        (lambda: ops.quantize_cdf(BAD_ROWS), ValueError, "probs has NaN, infinity or a negative entry in row 1 and"),
        (lambda: ops.quantize_cdf(BAD_ROWS[2:]), ValueError, "a negative entry in row 0 and must not"),
        (lambda: ops.quantize_cdf(torch.tensor([1.0, math.inf])), ValueError, "NaN, infinity or a negative entry"),
        (lambda: ops.quantize_cdf(torch.tensor([1.0, -1e-30])), ValueError, "NaN, infinity or a negative entry"),
        (lambda: ops.quantize_cdf(torch.tensor([1.0, -math.nan])), ValueError, "NaN, infinity or a negative entry"),
        (lambda: ops.quantize_cdf(torch.zeros(2, 3)), ValueError, "probs sums to zero in row 0 and must not"),
        (lambda: ops.quantize_cdf(logits=BAD_ROWS), ValueError, r"logits has NaN or \+infinity in row 1 and must not"),
        (lambda: ops.quantize_cdf(logits=P * math.inf), ValueError, r"logits has NaN or \+infinity in row 0"),
        (
            lambda: ops.quantize_cdf(logits=-P * math.inf),
            ValueError,
            "logits has nothing above -90852 in row 0 and must",
        ),
        (lambda: ops.ac_encode([1], CDF), TypeError, "ac_encode: symbols is a list and must be a Tensor"),
        (lambda: ops.ac_encode(SYMBOLS, None), TypeError, "ac_encode: cdf is a NoneType and must be a Tensor"),
        (
            lambda: ops.ac_encode(SYMBOLS[0], CDF),
            ValueError,
            r"symbols has shape \[15\] and must be \[streams, length\]",
        ),
        (lambda: ops.ac_encode(SYMBOLS.float(), CDF), ValueError, "symbols has dtype float32 and must have an integer"),
        (lambda: ops.ac_encode(SYMBOLS.bool(), CDF), ValueError, "symbols has dtype bool and must have an integer"),
        (lambda: ops.ac_encode(SYMBOLS, CDF.long()), ValueError, "cdf has dtype int64 and must have int32 or uint16"),
        (lambda: ops.ac_encode(SYMBOLS, CDF[0]), ValueError, r"cdf has shape \[\] and must broadcast to \[streams, le"),
        (lambda: ops.ac_encode(SYMBOLS, CDF[:1]), ValueError, "cdf has 1 entries in its last dimension and must have"),
        (
            lambda: ops.ac_encode(SYMBOLS, CDF.expand(9, 5)),
            ValueError,
            r"cdf has shape \[9, 5\], which does not broadc",
        ),
        (lambda: ops.ac_encode(SYMBOLS, CDF.expand(3, 1, 5)), ValueError, "which does not broadcast to the 2 streams"),
        (lambda: ops.ac_encode(SYMBOLS, CDF.expand(1, 1, 1, 5)), ValueError, r"and must broadcast to \[streams, lengt"),
        (lambda: ops.ac_encode(SYMBOLS, CDF - 1), ValueError, "cdf ends in 65535 and must end in a power of two from"),
        (lambda: ops.ac_encode(SYMBOLS, CDF + 1), ValueError, "cdf ends in 65537 and must end in a power of two from"),
        (lambda: ops.ac_encode(SYMBOLS, CDF * 512), ValueError, "cdf ends in 33554432 and must end in a power of two"),
        (lambda: ops.ac_encode(SYMBOLS, CDF * 0), ValueError, "cdf ends in 0 and must end in a power of two"),
        (lambda: ops.ac_encode(SYMBOLS, FALLING), ValueError, r"cdf\[0, 0\] is no cumulative distribution: it must r"),
        (lambda: ops.ac_encode(SYMBOLS, FALLING.to(torch.uint16)), ValueError, "is no cumulative distribution"),
        (lambda: ops.ac_encode(SYMBOLS, (CDF - 1).to(torch.uint16)), ValueError, "must rise from 0 to 65536"),
        (lambda: ops.ac_encode(SYMBOLS, EACH), ValueError, r"cdf\[1, 4\] is no cumulative distribution"),
        (lambda: ops.ac_encode(SYMBOLS + 1, CDF), IndexError, r"symbols\[0, 3\] is 4 and must be 0 to 3"),
        (lambda: ops.ac_encode(SYMBOLS - 3, CDF), IndexError, r"symbols\[0, 0\] is -3 and must be 0 to 3"),
        (lambda: ops.ac_encode(SYMBOLS << 40, CDF), IndexError, r"symbols\[0, 1\] is 1099511627776 and must"),
        (lambda: ops.ac_encode(SYMBOLS, GAP), ValueError, r"symbols\[0, 1\] is 1, which cdf gives no share and so"),
        (lambda: ops.ac_encode(SYMBOLS * 0 + 1, LATE), ValueError, r"symbols\[0, 3\] is 1, which cdf gives no share"),
        (lambda: ops.ac_encode(SYMBOLS, CDF, lanes=0), ValueError, "lanes is 0 and must be 1 to 64"),
        (lambda: ops.ac_encode(SYMBOLS, CDF, lanes=65), ValueError, "lanes is 65 and must be 1 to 64"),
        (lambda: ops.ac_encode(SYMBOLS, CDF, lanes="2"), TypeError, "ac_encode: lanes is a str and must be an int"),
        (lambda: ops.ac_encode(SYMBOLS, CDF, model_id=-1), ValueError, r"model_id is -1 and must be 0 to 2\^63 - 1"),
        (lambda: ops.ac_encode(SYMBOLS, CDF, model_id=2**63), ValueError, r"and must be 0 to 2\^63 - 1"),
        (lambda: ops.ac_encode(SYMBOLS, CDF, model_id="a"), TypeError, "model_id is a str and must be an int"),
        (lambda: ops.ac_decode([b""], CDF), TypeError, "ac_decode: streams is a list and must be a Bitstreams"),
        (lambda: ops.ac_decode(STREAMS, 1), TypeError, "ac_decode: cdf is a int and must be a Tensor"),
        (lambda: ops.ac_decode(STREAMS, CDF.expand(4, 5)), ValueError, "which does not broadcast to the 15 symbols of"),
        (lambda: ops.ac_decode(STREAMS, FALLING), ValueError, r"cdf\[0, 0\] is no cumulative distribution"),
        (
            lambda: ops.ac_decode(Bitstreams.from_bytes([*STREAMS.to_bytes(), *STREAMS7.to_bytes()]), CDF),
            ValueError,
            r"ac_decode: streams have 15 and 7 symbols \(0 and 2\) and must have equally many",
        ),
        (
            lambda: ops.ac_decode(Bitstreams(STREAMS.data.int(), STREAMS.offsets), CDF),
            ValueError,
            r"data is int32 \[\d+\] and must be uint8 \[bytes\]",
        ),
        (
            lambda: ops.ac_decode(Bitstreams(STREAMS.data, STREAMS.offsets.int()), CDF),
            ValueError,
            r"offsets is int32 \[3\] and must be int64 \[streams \+ 1\]",
        ),
        (
            lambda: ops.ac_decode(Bitstreams(STREAMS.data, STREAMS.offsets.flip(0)), CDF),
            ValueError,
            r"offsets\[1\] is \d+ and must be \d+ to \d+",
        ),
        (
            lambda: ops.ac_decode(Bitstreams(STREAMS.data, STREAMS.offsets + 1), CDF),
            ValueError,
            r"offsets\[2\] is \d+ and must be \d+ to \d+",
        ),
        (lambda: Bitstreams.from_bytes(b"abc"), TypeError, "Bitstreams.from_bytes: streams is a bytes and must be a l"),
        (
            lambda: Bitstreams.from_bytes([b"", "a"]),
            TypeError,
            r"Bitstreams.from_bytes: streams\[1\] is a str and must",
        ),
        (lambda: Bitstreams(b"", b""), TypeError, "Bitstreams: data is a bytes and must be a Tensor"),
        (lambda: ops.ac_encode_logits(SYMBOLS, CDF), ValueError, "ac_encode_logits: logits has dtype int32 and must"),
        (lambda: ops.ac_encode_logits(SYMBOLS, P), IndexError, r"symbols\[0, 3\] is 3 and must be 0 to 2"),
        (
            lambda: ops.ac_encode_logits(SYMBOLS * 0, torch.tensor([[0.0, 1.0], [0.0, math.nan]]).repeat(8, 1)[:15]),
            ValueError,
            r"ac_encode_logits: logits\[0, 1\] has NaN or \+infinity and must not",
        ),
        (
            lambda: ops.ac_encode_logits(SYMBOLS * 0, torch.full((2,), -math.inf)),
            ValueError,
            r"ac_encode_logits: logits\[0, 0\] has nothing above -90852 and must give some symbol mass",
        ),
        (
            lambda: ops.ac_encode_logits(SYMBOLS, torch.zeros(4), precision=1),
            ValueError,
            "logits has 4 symbols, and precision 1 has room for 2",
        ),
        (lambda: ops.ac_decode_logits(STREAMS, None), TypeError, "ac_decode_logits: logits is a NoneType and must be"),
    ],
)
def test_errors(isa: str, call: Callable[[], object], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence) as caught:
        call()
    assert not isinstance(caught.value, BitstreamError)


STREAMS7 = ops.ac_encode(SYMBOLS[:1, :7], CDF)


def test_errors_of_the_pybind_face() -> None:
    """The same checks and sentences."""
    native = pycore.native
    for call, sentence in (
        (lambda: native.ac_encode(SYMBOLS, CDF, lanes=99), "ac_encode: lanes is 99 and must be 1 to 64"),
        (lambda: native.quantize_cdf(P, precision=99), "quantize_cdf: precision is 99 and must be 1 to 24"),
        (lambda: native.quantize_cdf(P * 0), "quantize_cdf: probs sums to zero in row 0 and must not"),
        (lambda: native.ac_decode(STREAMS.data[:-1], STREAMS.offsets, CDF), "ac_decode: offsets[2] is"),
        (lambda: native.ac_encode(SYMBOLS, CDF, threads=0), "ac_encode: threads is 0 and must be at least 1"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(sentence)):
            call()
    with pytest.raises(IndexError, match=r"^ac_encode: symbols\[0, 3\] is 4 and must be 0 to 3$"):
        native.ac_encode(SYMBOLS + 1, CDF)


def test_shares_past_the_end(isa: str) -> None:
    """A row of a decoder's caller may say anything: shares above 2^precision took the range to 0, for ever."""
    for precision, end in ((24, 1 << 30), (16, 1 << 30), (16, (1 << 16) + 1)):
        good = torch.tensor([0, 1 << precision - 1, 1 << precision], dtype=torch.int32)
        streams = ops.ac_encode(torch.zeros(1, 40, dtype=torch.int64), good, model_id=1)
        rows = torch.tensor([0, end, 1 << precision], dtype=torch.int32).repeat(40, 1)
        with pytest.raises(ValueError, match=r"^ac_decode: cdf\[0, 0\] is no cumulative distribution"):
            ops.ac_decode(streams, rows, model_id=1)


@pytest.mark.parametrize("length", [2**62, 1152780784296263881])
def test_more_symbols_than_any_memory(length: int) -> None:
    """An expanded tensor has any length; at the second one the bytes that it may take are 2 modulo 2^64."""
    symbols = torch.zeros(1, 1, dtype=torch.uint8).expand(1, length)
    with pytest.raises(ValueError, match=rf"symbols has shape \[1, {length}\], and a stream may have \d+ symbols$"):
        ops.ac_encode(symbols, CDF)
    with pytest.raises(ValueError, match=rf"^ac_encode_bytes: data has shape \[1, {length}\], and a stream may have"):
        ops.ac_encode_bytes(symbols)
    with pytest.raises(ValueError, match=r"^ac_encode: symbols has shape \[1, \d+\], and a stream may have"):
        pycore.native.ac_encode(np.broadcast_to(np.zeros((1, 1), np.uint8), (1, length)), CDF.numpy())


def test_more_streams_than_any_memory() -> None:
    symbols = torch.zeros(1, 1, dtype=torch.uint8).expand(2**22, 2**40)
    with pytest.raises(ValueError, match=r"^ac_encode: symbols has shape \[4194304, 1099511627776\], which is more"):
        ops.ac_encode(symbols, CDF)

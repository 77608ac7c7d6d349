# SPDX-License-Identifier: Apache-2.0
"""What a frame claims is not believed before it is known; where in a stream a decoder stands; which symbol is at fault.

A frame is 32 bytes and may claim 2^48 symbols. Forged ones are decoded under a limit on the process's addresses.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pycore
from pycore import BitstreamError, Bitstreams, native, ops
from tests.support.coder_inputs import random_cdf

ROOT = Path(__file__).resolve().parents[3]


def frame(
    count: int, payload: bytes = b"", *, kind: int = 0, lanes: int = 1, model: int | None = 7, symbols_crc: int = 0
) -> bytes:
    """A frame whose checksum holds: see docs/formats.md."""
    start = 0xCBF29CE484222325  # of a stream without rows
    head = bytes([0xAC, 1, kind | (0x80 if model is not None else 0), lanes])
    rest = symbols_crc.to_bytes(4, "little") + (start if model is None else model).to_bytes(8, "little")
    rest += count.to_bytes(6, "little") + len(payload).to_bytes(6, "little") + payload
    crc = 0xFFFFFFFF
    for byte in head + rest:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return head + (crc ^ 0xFFFFFFFF).to_bytes(4, "little") + rest


def with_lanes(payload: bytes, lanes: int) -> bytes:
    """All of the payload in the first lane."""
    return b"".join(len(payload if i == 0 else b"").to_bytes(6, "little") for i in range(lanes - 1)) + payload


PAYLOADS = [b"", b"\1", b"\x12\x34", bytes(range(1, 60)), b"\xff" * 300]
UNIFORM, SKEWED = [1.0] * 256, [2.0**20] + [1.0] * 255


@pytest.mark.parametrize("count", [2**27, 2**36, 2**48 - 1])
def test_claims_that_no_payload_holds(isa: str, count: int) -> None:
    """In a process that could not hold the symbols: its memory follows the payload."""
    streams = [
        *(frame(count, with_lanes(payload, lanes), lanes=lanes) for payload in PAYLOADS for lanes in (1, 3)),
        *(frame(count, payload, kind=kind, model=None) for payload in PAYLOADS for kind in (1, 2)),
    ]
    code = f"""
import re, resource, time
import numpy as np, torch
import pycore
from pycore import native, ops
native.set_cpu_isa({isa!r})
torch.ones(4) @ torch.ones(4)
cdfs = [ops.quantize_cdf(torch.tensor(p), precision=n) for p in ({UNIFORM}, {SKEWED}) for n in (16, 20)]
logits = [torch.zeros(256), torch.tensor([9.0] + [0.0] * 255)]
limit = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024 + (1 << 27)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
def refused(call):
    try:
        call()
    except pycore.BitstreamError as error:
        said = "claims {count} symbols|checksum does not hold|no symbol has its next code"
        assert re.search(said, str(error)), str(error)
        return True
for stream in {streams}:
    data, offsets = np.frombuffer(stream, np.uint8), np.array([0, len(stream)])
    both = pycore.Bitstreams.from_bytes([stream])
    if stream[2] & 127:
        assert refused(lambda: ops.ac_decode_bytes(both)) and refused(lambda: native.ac_decode_bytes(data, offsets))
        continue
    for cdf in cdfs:
        assert refused(lambda: ops.ac_decode(both, cdf, model_id=7))
        assert refused(lambda: native.ac_decode(data, offsets, cdf, model_id=7))
        if stream[3] == 1:
            decoder = pycore.ArithmeticDecoder(stream, model_id=7)
            assert len(decoder) == decoder.remaining == {count}
            assert refused(lambda: decoder.decode(cdf, count={count}))
            assert decoder.remaining == {count} and decoder.position == 0
    for row in logits:
        assert refused(lambda: ops.ac_decode_logits(both, row, model_id=7))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_claims_beside_good_streams() -> None:
    cdf = ops.quantize_cdf(torch.ones(4))
    good = ops.ac_encode(torch.zeros(1, 2**27, dtype=torch.uint8)[:, :1000], cdf, model_id=7).to_bytes()[0]
    streams = Bitstreams.from_bytes([good, frame(1000, b"")])
    with pytest.raises(BitstreamError, match=r"^ac_decode: streams\[1\] was coded with other distributions"):
        ops.ac_decode(streams, cdf, model_id=7)
    with pytest.raises(BitstreamError, match=rf"^ac_decode: streams\[0\] is damaged: it claims {2**30} symbols, and"):
        ops.ac_decode(Bitstreams.from_bytes([frame(2**30, b"\x77\x77")]), cdf, model_id=7)


@pytest.mark.parametrize("lanes", [1, 5])
@pytest.mark.parametrize("precision", [8, 16, 22])
def test_true_claims(isa: str, lanes: int, precision: int) -> None:
    """Symbols that cost next to nothing: far more than a payload's bits, and truly there."""
    length = 300_003
    skewed = ops.quantize_cdf(torch.tensor([2.0**30, 1.0, 1.0]), precision=precision)
    only = torch.tensor([0, 0, 1 << precision, 1 << precision], dtype=torch.int32)
    runs = torch.zeros(2, length, dtype=torch.int64)
    rare = runs.clone()
    rare[0, 300_000:300_040] = 2
    rare[1, 17] = 1
    last = runs.clone()
    last[:, -1] = 2
    uniform = ops.quantize_cdf(torch.ones(3), precision=precision)
    cases = [(runs, uniform), (runs, skewed), (rare, skewed), (last, skewed), (last, uniform), (runs + 1, only)]
    for symbols, cdf in cases:
        streams = ops.ac_encode(symbols, cdf, lanes=lanes)
        assert torch.equal(ops.ac_decode(streams, cdf), symbols)
        if lanes == 1:
            decoder = pycore.ArithmeticDecoder(streams.to_bytes()[0])
            np.testing.assert_array_equal(decoder.decode(cdf, count=length), symbols[0])
            decoder.finish()
    damaged = bytearray(ops.ac_encode(runs[:1], uniform, lanes=lanes).to_bytes()[0])
    assert len(damaged) < 64
    forged = frame(
        length + 1, bytes(damaged[32:]), lanes=lanes, model=None, symbols_crc=int.from_bytes(damaged[8:12], "little")
    )
    forged = forged[:12] + bytes(damaged[12:20]) + forged[20:]
    with pytest.raises(BitstreamError):
        ops.ac_decode(Bitstreams.from_bytes([forged]), uniform)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("byte", [0, 32, 255])
def test_true_claims_of_bytes(isa: str, order: int, byte: int) -> None:
    data = torch.full((2, 2_500_000), byte, dtype=torch.uint8)
    data[1, 2_000_000:2_000_100] = torch.arange(100, dtype=torch.uint8)
    streams = ops.ac_encode_bytes(data, order=order)
    assert streams.nbytes < 12_000
    assert torch.equal(ops.ac_decode_bytes(streams), data)


@pytest.mark.parametrize("at", [1, 57, 199])
@pytest.mark.parametrize("lanes", [1, 4])
def test_the_symbol_at_fault_is_named(isa: str, at: int, lanes: int) -> None:
    symbols = torch.randint(6, (3, 200))
    cdf = random_cdf(3, 200, 6)
    streams = ops.ac_encode(symbols, cdf, model_id=1, lanes=lanes)
    bad = cdf.clone()
    bad[2, at, 1:6] = 70_000
    sentence = rf"cdf\[2, {at}\] is no cumulative distribution: it must rise from 0 to 65536$"
    with pytest.raises(ValueError, match=f"^ac_decode: {sentence}"):
        ops.ac_decode(streams, bad, model_id=1)
    with pytest.raises(ValueError, match=f"^ac_decode: {sentence}"):
        native.ac_decode(streams.data, streams.offsets, bad, model_id=1)
    with pytest.raises(ValueError, match=f"^ac_encode: {sentence}"):
        ops.ac_encode(symbols, bad, model_id=1, lanes=lanes)
    if lanes > 1:
        return
    logits = torch.randn(3, 200, 6)
    streams = ops.ac_encode_logits(symbols, logits, model_id=1)
    for value, what in ((math.nan, "has NaN or +infinity and must not"), (-math.inf, "has nothing above -90852")):
        wrong = logits.clone()
        wrong[1, at] = value
        with pytest.raises(ValueError) as caught:
            ops.ac_decode_logits(streams, wrong, model_id=1)
        assert str(caught.value).startswith(f"ac_decode_logits: logits[1, {at}] {what}")


# ---- a few symbols at a time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.uint64])
def test_integers_of_numpy(dtype: Any) -> None:
    cdf = native.quantize_cdf(np.array([0.5, 0.3, 0.2]))
    plain = native.ArithmeticEncoder(model_id=3)
    other = native.ArithmeticEncoder(model_id=np.int64(3))
    for symbol in (1, 0, 2, 2, 1):
        plain.encode(symbol, cdf)
        other.encode(dtype(symbol), cdf)
    for symbol in (0, 1):
        plain.encode(symbol, cdf)
        other.encode([np.array(symbol, dtype), torch.tensor(symbol)][symbol], cdf)
    stream = plain.finish()
    assert other.finish() == stream
    decoder = native.ArithmeticDecoder(stream, model_id=np.int32(3))
    assert decoder.decode(cdf, count=dtype(5)).tolist() == [1, 0, 2, 2, 1]


def test_what_is_no_symbol() -> None:
    cdf = native.quantize_cdf(np.array([0.5, 0.3, 0.2]))
    encoder = native.ArithmeticEncoder()
    for bad in (True, np.True_):
        with pytest.raises(TypeError, match=r"^ArithmeticEncoder: symbols is (a )?bool_? and must be (an int|a NumPy)"):
            encoder.encode(bad, cdf)
    for wrong in (1.0, "1", None, np.float64(1)):
        with pytest.raises(TypeError, match=r"^ArithmeticEncoder: symbols is (a )?\w+ and must be"):
            encoder.encode(wrong, cdf)
    for far in (3, -1, np.int64(3), 2**70, np.uint64(2**63)):
        with pytest.raises(IndexError, match=r"^ArithmeticEncoder: symbols\[0\] is"):
            encoder.encode(far, cdf)
    assert len(encoder) == 0 and encoder.position == 0


@pytest.mark.parametrize("precision", [4, 16, 24])
def test_position(isa: str, precision: int) -> None:
    """Whole bits of the payload that are settled: what the symbols are worth, in encoder and decoder alike."""
    cdf = ops.quantize_cdf(torch.tensor([0.6, 0.25, 0.1, 0.05]), precision=precision).numpy()
    symbols = torch.randint(4, (400,)).numpy()
    encoder, worth, positions = pycore.ArithmeticEncoder(), 0.0, [0]
    assert encoder.position == 0
    for symbol in symbols:
        encoder.encode(symbol, cdf)
        worth -= math.log2((cdf[symbol + 1] - cdf[symbol]) / 2**precision)
        positions.append(encoder.position)
        assert worth - 1 <= positions[-1] <= worth + 0.01
    stream = encoder.finish()
    assert encoder.position == positions[-1]
    assert 8 * (len(stream) - 32) - 32 <= positions[-1] <= 8 * (len(stream) - 32) + 64
    decoder = pycore.ArithmeticDecoder(stream)
    for i, symbol in enumerate(symbols):
        assert decoder.position == positions[i]
        assert decoder.decode(cdf) == symbol
    assert decoder.position == positions[-1]
    again = pycore.ArithmeticDecoder(stream)
    again.decode(cdf, count=123)
    assert again.position == positions[123]
    with pytest.raises(BitstreamError):
        again.decode(cdf, count=400)
    assert again.position == positions[123]


def test_position_of_symbols_that_cost_nothing() -> None:
    only = np.array([0, 0, 65536, 65536], np.int32)
    encoder = pycore.ArithmeticEncoder().encode(np.full(1000, 1), only)
    assert encoder.position <= 1
    decoder = pycore.ArithmeticDecoder(encoder.finish())
    decoder.decode(only, count=1000)
    assert decoder.position == encoder.position

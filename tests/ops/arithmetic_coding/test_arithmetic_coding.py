# SPDX-License-Identifier: Apache-2.0
"""The coder: distributions, streams against the reference and the golden files, sizes, the same bytes, torch's
transforms.

test_arithmetic_coding_errors.py has what damaged streams and bad arguments get, and test_arithmetic_coding_streaming.py
the classes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import pycore
from pycore import BitstreamError, Bitstreams, ops
from pycore.reference import arithmetic_coding as reference
from tests.support.coder_inputs import SYMBOL_DTYPES, encode_all, ideal_bytes, random_cdf, two_symbols

kernels = torch.ops.pycore
GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "arithmetic_coding.json").read_text())
# b"abracadabra, abracadabra" with the adaptive models of order 0 and 1, version 1.
ADAPTIVE = [
    "ac0101013d43f8a5851eecde25232284e49cf2cb1800000000000e0000000000616490694973d02d6a67431a0774",
    "ac0102011e6a1381851eecde25232284e49cf2cb180000000000100000000000616272616707692f4d9364811651a56f",
]
ALPHABETS = [1, 2, 3, 17, 128, 129, 255, 256, 257, 300]


# ---- distributions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symbols", ALPHABETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_quantize_is_the_reference(isa: str, symbols: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(7, symbols) * 6).to(dtype)
    logits[1, : symbols // 2] = -math.inf
    logits[2] *= 100
    probs = logits.float().softmax(-1).to(dtype)
    probs[3, 0], probs[3, 1:] = 0.5, 0
    probs[4] = probs[4] * (2.0 ** (-12 if dtype == torch.float16 else -70))
    for precision in (9, 16, 24, None):
        by_logits = ops.quantize_cdf(logits=logits, precision=precision)
        by_probs = ops.quantize_cdf(probs, precision=precision)
        for row in range(7):
            counts = reference.counts_of_logits(logits[row].float().tolist())
            assert by_logits[row].tolist() == reference.cdf_of_counts(counts, precision)
            counts = reference.counts_of_probs(probs[row].tolist())
            assert by_probs[row].tolist() == reference.cdf_of_counts(counts, precision)


def test_extreme_probabilities() -> None:
    """Subnormal numbers, the largest, one symbol with everything, and V = 2^precision."""
    tiny, huge = 5e-324, 1.7e308
    rows = [[tiny, 0.0, 1e-320], [huge, huge, 1.0], [2.0**-1022, 2.0**-1023, 0.0], [0.0, 1.0, 0.0], [-0.0, 3.0, 1e-9]]
    for row in rows[1:]:
        cdf = ops.quantize_cdf(torch.tensor(row, dtype=torch.float64), precision=20).tolist()
        assert cdf == reference.cdf_of_counts(reference.counts_of_probs(row), 20)
    with pytest.raises(ValueError, match="probs sums to zero"):  # below the grid of subnormal numbers
        ops.quantize_cdf(torch.tensor(rows[0], dtype=torch.float64))
    single = torch.tensor([1e-40, 2e-45, 0.0])
    assert ops.quantize_cdf(single).tolist() == reference.cdf_of_counts(reference.counts_of_probs(single.tolist()))
    assert ops.quantize_cdf(torch.rand(16), precision=4).tolist() == list(range(17))
    assert ops.quantize_cdf(torch.tensor([0.0, 1.0, 0.0])).tolist() == [0, 1, 65535, 65536]


def test_rounding_of_logits(isa: str) -> None:
    """Ties to even, the bounds of the grid, and both sides of its points: where instruction sets could differ."""
    points = torch.arange(-200, 200, dtype=torch.float64).add(0.5).div(reference.LOGIT_SCALE).float()
    edges = torch.cat([points, points.nextafter(torch.tensor(9.0)), points.nextafter(torch.tensor(-9.0))])
    edges = torch.cat([edges, torch.tensor([9e4, -9e4, 1e30, -1e30, 3e38, -3e38, 0.0, -0.0])])
    for logits in (edges, edges[:-8], edges[:21]):
        expected = reference.cdf_of_counts(reference.counts_of_logits(logits.tolist()), 24)
        assert ops.quantize_cdf(logits=logits, precision=24).tolist() == expected


@pytest.mark.parametrize("highest", [-90852.5, -90852, -90840, -90834.9, -90834.7, -90830, 0, 90852, 90853, 3e38])
def test_rows_near_the_bounds_of_the_grid(isa: str, highest: float) -> None:
    """What is held at a bound counts from there; whether that can matter depends on the row's highest logit."""
    below = torch.tensor([0, 0.04, 1, 5, 12, 16, 17.3, 17.5, 100, 1e6, 9.4e7, 1e8, 1e30, math.inf])
    logits = (highest - below.repeat(6)).float()[:77]
    if highest < -reference.LOGIT_BOUND / reference.LOGIT_SCALE:
        with pytest.raises(ValueError, match="logits has nothing above -90852"):
            ops.quantize_cdf(logits=logits)
        return
    counts = reference.counts_of_logits(logits.tolist())
    expected = reference.cdf_of_counts(counts, 24)
    assert ops.quantize_cdf(logits=logits, precision=24).tolist() == expected
    rows, symbols = logits.expand(77, 77), torch.arange(77)
    streams = ops.ac_encode_logits(symbols[None], rows[None], precision=24)
    assert streams.to_bytes() == ops.ac_encode(symbols[None], torch.tensor(expected, dtype=torch.int32)).to_bytes()
    assert torch.equal(ops.ac_decode_logits(streams, rows[None], precision=24)[0], symbols)


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf])
def test_what_is_no_logit_is_found_in_every_place(isa: str, value: float) -> None:
    for place in range(75):
        logits = torch.randn(75)
        logits[place] = value
        with pytest.raises(ValueError, match=r"logits has NaN or \+infinity in row 0 and must not"):
            ops.quantize_cdf(logits=logits)
        with pytest.raises(ValueError, match=r"logits\[0, 0\] has NaN or \+infinity and must not"):
            ops.ac_encode_logits(torch.tensor([[3]]), logits[None, None])


def test_quantized_distributions_are_close() -> None:
    """The grid costs less than 2e-4 bits a symbol; the least share of 2^-16, at 256 symbols, 0.0056 at the most."""
    logits = torch.randn(64, 256, dtype=torch.float64) * 4
    probs = logits.softmax(-1)
    for given, precision, bound in (("logits", 24, 2e-4), ("probs", 24, 3e-5), ("logits", 16, 0.006)):
        cdf = ops.quantize_cdf(**{given: logits if given == "logits" else probs}, precision=precision)
        shares = cdf.diff().double() / 2.0**precision
        divergence = (probs * (probs.log2() - shares.log2())).sum(-1)
        assert 0 <= divergence.min() and divergence.mean() < bound


def test_precision_by_the_number_of_symbols() -> None:
    """None: what the least shares cost stays below 0.0001 bits while 24 bits allow it, in both faces and the coder."""
    expected = {1: 16, 4: 16, 5: 17, 256: 22, 257: 23, 512: 23, 513: 24, 50257: 24}
    for symbols, precision in expected.items():
        logits = torch.randn(2, 9, symbols) * 2
        cdf = ops.quantize_cdf(logits=logits, precision=None)
        assert torch.equal(cdf, ops.quantize_cdf(logits=logits, precision=precision))
        assert cdf[0, 0, -1] == 1 << precision == 1 << reference.precision_for(symbols)
        assert (pycore.native.quantize_cdf(logits.numpy(), logits=True, precision=None) == cdf.numpy()).all()
        assert symbols > 1024 or math.log2((1 << precision) / ((1 << precision) - symbols)) < 1e-4
        drawn = torch.randint(symbols, (2, 9))
        streams = ops.ac_encode_logits(drawn, logits, precision=None)
        assert streams.to_bytes() == ops.ac_encode(drawn, cdf).to_bytes()
        assert torch.equal(ops.ac_decode_logits(streams, logits, precision=None), drawn)


def test_a_large_vocabulary_loses_little() -> None:
    """50,257 symbols of ten bits: 24 bits, which None chooses, cost 0.01 % where 16 cost ten per cent and more."""
    probs = (torch.randn(4, 50257, dtype=torch.float64) * 2.0).softmax(-1)
    entropy = -(probs * probs.log2()).sum(-1)
    excess = {}
    for precision in (None, 16):
        cdf = ops.quantize_cdf(probs, precision=precision)
        shares = cdf.diff().double() / cdf[:, -1:]
        excess[precision] = ((probs * (probs.log2() - shares.log2())).sum(-1) / entropy).max()
    assert 0 <= excess[None] < 1e-4 and excess[16] > 1e-2, excess


def test_quantize_takes_strides_and_empty_rows() -> None:
    probs = torch.rand(5, 6, 7)
    expected = ops.quantize_cdf(probs)
    assert torch.equal(ops.quantize_cdf(probs.transpose(0, 2).contiguous().transpose(0, 2)), expected)
    wide = torch.rand(5, 6, 21)
    assert torch.equal(ops.quantize_cdf(wide[..., ::3]), ops.quantize_cdf(wide[..., ::3].contiguous()))
    assert torch.equal(ops.quantize_cdf(probs[0, 0].expand(4, 7)), expected[0, 0].expand(4, 8))
    assert ops.quantize_cdf(torch.rand(0, 7)).shape == (0, 8)
    assert ops.quantize_cdf(torch.rand(7)).shape == (8,)


# ---- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_golden_streams(isa: str, case: dict) -> None:
    """Bytes of version 1, which every later version writes and reads: a change here is a change of the format."""
    rows, lanes, model_id = torch.tensor(case["rows"], dtype=torch.int32), case.get("lanes", 1), case.get("model_id")
    symbols = torch.tensor([case["symbols"]], dtype=torch.int64)
    cdf = rows[torch.tensor(case["row_of"], dtype=torch.int64)]
    assert encode_all(symbols, cdf, model_id, lanes) == [bytes.fromhex(case["stream"])]
    streams = ops.ac_encode(symbols, cdf, model_id=model_id, lanes=lanes)
    assert streams.to_bytes() == [bytes.fromhex(case["stream"])]
    assert torch.equal(ops.ac_decode(streams, cdf, model_id=model_id), symbols)
    assert reference.decode(bytes.fromhex(case["stream"]), cdf.tolist(), model_id) == case["symbols"]


@pytest.mark.parametrize("symbols", ALPHABETS)
@pytest.mark.parametrize("length", [0, 1, 2, 113])
def test_streams_are_the_references(isa: str, symbols: int, length: int) -> None:
    """A row for each symbol, a row for each stream, one for all; at every precision that renormalises differently."""
    for precision in (9, 16, 17, 24):
        cdf = random_cdf(5, max(length, 1), symbols, precision=precision)[:, :length]
        drawn = torch.randint(symbols, (5, length))
        for model in (cdf, cdf[:, :1], cdf[:1], cdf[0, 0] if length else random_cdf(symbols, precision=precision)):
            streams = ops.ac_encode(drawn, model)
            assert streams.to_bytes() == encode_all(drawn, model)
            assert torch.equal(ops.ac_decode(streams, model), drawn)


@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 5, 8, 32, 64])
@pytest.mark.parametrize("length", [0, 1, 7, 64, 131])
def test_lanes(isa: str, lanes: int, length: int) -> None:
    for precision in (12, 24):
        cdf, drawn = random_cdf(1, 40, precision=precision), torch.randint(40, (3, length))
        streams = ops.ac_encode(drawn, cdf, lanes=lanes)
        assert streams.to_bytes() == encode_all(drawn, cdf, lanes=lanes)
        assert torch.equal(ops.ac_decode(streams, cdf), drawn)
        each = cdf.expand(length, 41).contiguous()  # lanes with a row for each symbol
        assert torch.equal(ops.ac_decode(streams, each), drawn)


def test_large_alphabets(isa: str) -> None:
    for symbols, precision in ((1024, 16), (32768, 16), (65536, 16), (65536, 24), (1 << 17, 20)):
        cdf = ops.quantize_cdf(logits=torch.randn(symbols) * 3, precision=precision)
        drawn = torch.randint(symbols, (2, 500))
        drawn[0, :2] = torch.tensor([0, symbols - 1])
        streams = ops.ac_encode(drawn, cdf)
        assert torch.equal(ops.ac_decode(streams, cdf), drawn)
        assert torch.equal(ops.ac_decode(streams, cdf.expand(500, -1)[:, :]), drawn)
        if symbols == 32768:
            assert streams.to_bytes() == encode_all(drawn, cdf)


def test_rows_with_symbols_that_have_no_share(isa: str) -> None:
    """Equal neighbours in the middle and at both ends; every symbol with a share is coded."""
    cdf = torch.tensor([0, 0, 0, 5, 5, 5, 9, 65536, 65536], dtype=torch.int32)
    drawn = torch.tensor([[2, 5, 6, 6, 2, 6, 5, 5, 2]])
    narrow = cdf[:-1].to(torch.uint16)  # 2^16 has one place there, the last
    for model in (cdf, cdf.expand(9, 9).contiguous(), narrow, narrow.expand(9, 8).contiguous()):
        streams = ops.ac_encode(drawn, model)
        assert streams.to_bytes() == encode_all(drawn, cdf if model.shape[-1] == 9 else cdf[:-1])
        assert torch.equal(ops.ac_decode(streams, model), drawn)


def test_large_alphabets_with_symbols_that_have_no_share(isa: str) -> None:
    """More symbols than 2^precision: a symbol's number needs more bits than its share."""
    symbols = 70_000
    cdf = torch.zeros(symbols + 1, dtype=torch.int32)
    cdf[-101:-1] = torch.arange(100) + 400
    cdf[-1] = 1 << 16
    chosen = symbols - 1 - torch.arange(300).remainder(100)[None]
    for lanes in (1, 5):
        streams = ops.ac_encode(chosen, cdf, lanes=lanes)
        assert torch.equal(ops.ac_decode(streams, cdf), chosen)
    streams = ops.ac_encode(chosen.expand(4, -1), cdf)
    assert torch.equal(ops.ac_decode(streams, cdf), chosen.expand(4, -1))


@pytest.mark.parametrize("symbols", [1, 2, 3, 256, 5000, 65536])
def test_one_stream_with_one_model(isa: str, symbols: int) -> None:
    """Precision 16 has a loop of its own, with a table of whole shares: all of one share, thin ones, and ends."""
    generator = torch.Generator().manual_seed(symbols)
    steep, flat = torch.zeros(symbols, dtype=torch.float64), torch.rand(symbols, generator=generator)
    steep[symbols // 2] = 1
    for probs in (steep, flat, flat**20 + 1e-9):
        cdf = ops.quantize_cdf(probs)
        for length in (1, 15, 16, 17, 40, 3000):
            chosen = torch.randint(symbols, (1, length), generator=generator)
            chosen[0, length // 3 :: 2] = symbols // 2
            streams = ops.ac_encode(chosen, cdf)
            assert torch.equal(ops.ac_decode(streams, cdf), chosen)
            if length == 40:
                assert streams.to_bytes() == [reference.encode(chosen[0].tolist(), [cdf.tolist()] * length)]


def test_uint16_rows_are_the_same_model(isa: str) -> None:
    """2^16 does not fit and is held as 0; the bytes are those of the int32 rows."""
    for symbols in ALPHABETS:
        cdf, drawn = random_cdf(4, 50, symbols), torch.randint(symbols, (4, 50))
        narrow = cdf.to(torch.uint16)
        assert int(narrow[0, 0, -1]) == 0
        for model, small in ((cdf, narrow), (cdf[:, :1], narrow[:, :1])):
            streams = ops.ac_encode(drawn, model)
            assert ops.ac_encode(drawn, small).to_bytes() == streams.to_bytes()
            assert torch.equal(ops.ac_decode(streams, small), drawn)


@pytest.mark.parametrize("entropy", [0.001, 0.01, 0.1, 0.5, 0.9, 2.0, 5.0, 8.0, 11.0, 15.0])
def test_size(entropy: float) -> None:
    """Payload within 0.01 % + 8 bytes of the ideal, from peaked to flat distributions, at 16 and 24 bits."""
    if entropy < 1:
        probs = torch.tensor(two_symbols(entropy), dtype=torch.float64)
    else:
        probs = torch.rand(int(2**entropy), dtype=torch.float64) * 0.1 + 1
    drawn = torch.multinomial(probs, 200_000, replacement=True)
    for precision in (16, 24):
        cdf = ops.quantize_cdf(probs, precision=precision)
        streams = ops.ac_encode(drawn[None], cdf)
        ideal = ideal_bytes(drawn, cdf)
        assert ideal - 1 <= streams.nbytes - 32 <= ideal * 1.0001 + 8
        assert torch.equal(ops.ac_decode(streams, cdf)[0], drawn)


# ---- the same bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SYMBOL_DTYPES, ids=str)
def test_any_integer_dtype(isa: str, dtype: torch.dtype) -> None:
    cdf, drawn = random_cdf(120), torch.randint(120, (3, 1100))
    expected = ops.ac_encode(drawn, cdf).to_bytes()
    assert ops.ac_encode(drawn.to(dtype), cdf).to_bytes() == expected
    strided = drawn.to(dtype).T.contiguous().T
    assert strided.stride() == (1, 3) and ops.ac_encode(strided, cdf).to_bytes() == expected


def test_any_strides(isa: str) -> None:
    """Expanded, transposed, with gaps, with steps in the last dimension: the bytes of the contiguous copy."""
    drawn = torch.randint(33, (4, 60))
    base = random_cdf(4, 60, 33)
    spread = torch.zeros(60, 4, 68, dtype=torch.int32)
    spread[..., ::2] = base.transpose(0, 1)
    layouts = {
        "transposed": base.transpose(0, 1).contiguous().transpose(0, 1),
        "entries first": base.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "steps": spread[..., ::2].transpose(0, 1),
        "uint16 steps": spread.to(torch.uint16)[..., ::2].transpose(0, 1),
    }
    expected = ops.ac_encode(drawn, base)
    for name, cdf in layouts.items():
        assert torch.equal(cdf.int() & 0xFFFF, base & 0xFFFF), name
        assert ops.ac_encode(drawn, cdf).to_bytes() == expected.to_bytes(), name
        assert torch.equal(ops.ac_decode(expected, cdf), drawn), name
    one = base[0, 0]
    expected = ops.ac_encode(drawn, one.expand(4, 60, 34).contiguous())
    for cdf in (
        one,
        one[None],
        one[None, None],
        one.expand(4, 60, 34),
        one.expand(60, 34).contiguous(),
        one.expand(4, 1, 34),
    ):
        assert ops.ac_encode(drawn, cdf).to_bytes() == expected.to_bytes()
        assert torch.equal(ops.ac_decode(expected, cdf), drawn)


def test_offsets_beyond_two_to_the_31(isa: str) -> None:
    """Rows whose elements lie more than 2^31 apart: zeros that nobody wrote take no memory."""
    far = 1 << 30
    symbols = torch.tensor([[1, 0, 2]])
    rows = torch.tensor([[0, 9, 65000, 65536], [0, 1, 2, 65536], [0, 60000, 65000, 65536]], dtype=torch.int32)
    memory = np.zeros(2 * far + 16, dtype=np.uint16)
    lent = np.lib.stride_tricks.as_strided(memory, (3, 4), (far * 2, 2))
    lent[:] = rows.numpy().astype(np.uint16)
    cdf = torch.from_numpy(memory).as_strided((3, 4), (far, 1))
    streams = ops.ac_encode(symbols, cdf)
    assert streams.to_bytes() == ops.ac_encode(symbols, rows).to_bytes()
    assert torch.equal(ops.ac_decode(streams, cdf), symbols)


@pytest.mark.usefixtures("threads")
def test_batch_and_threads(isa: str) -> None:
    """A stream's bytes are its own: alone, in any batch, on any number of threads."""
    cdf, drawn = random_cdf(64, 300, 20), torch.randint(20, (64, 300))
    logits = torch.randn(64, 300, 20)
    alone = [ops.ac_encode(drawn[i : i + 1], cdf[i : i + 1]).to_bytes()[0] for i in range(64)]
    fixed = [ops.ac_encode(drawn[i : i + 1], cdf[0, 0]).to_bytes()[0] for i in range(64)]
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        for batch in (1, 8, 64):
            part = slice(0, batch)
            streams = ops.ac_encode(drawn[part], cdf[part])
            assert streams.to_bytes() == alone[part]
            assert torch.equal(ops.ac_decode(streams, cdf[part]), drawn[part])
            streams = ops.ac_encode(drawn[part], cdf[0, 0])
            assert streams.to_bytes() == fixed[part]
            assert torch.equal(ops.ac_decode(streams, cdf[0, 0]), drawn[part])
            streams = ops.ac_encode_logits(drawn[part], logits[part])
            assert torch.equal(ops.ac_decode_logits(streams, logits[part]), drawn[part])
        data, offsets = pycore.native.ac_encode(drawn.numpy(), cdf.numpy(), threads=count)
        assert Bitstreams(torch.from_numpy(data), torch.from_numpy(offsets)).to_bytes() == alone


@pytest.mark.parametrize("symbols", [*ALPHABETS, 1000])
def test_logits_are_coded_as_their_cdf(isa: str, symbols: int) -> None:
    for precision in (10, 16, 24):
        logits = torch.randn(3, 40, symbols) * 5
        logits[:, :, : symbols // 3] = -math.inf
        drawn = torch.randint(symbols, (3, 40))
        for model in (
            logits,
            logits[:, :1],
            logits[0],
            logits[0, 0],
            logits.double(),
            logits.half(),
            logits.bfloat16(),
        ):
            cdf = ops.quantize_cdf(logits=model, precision=precision)
            streams = ops.ac_encode_logits(drawn, model, precision=precision)
            assert streams.to_bytes() == ops.ac_encode(drawn, cdf).to_bytes()
            assert torch.equal(ops.ac_decode_logits(streams, model, precision=precision), drawn)
            assert torch.equal(ops.ac_decode(streams, cdf), drawn)
    strided = logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert ops.ac_encode_logits(drawn, strided).to_bytes() == ops.ac_encode_logits(drawn, logits).to_bytes()


def test_small_differences_of_logits_do_not_matter() -> None:
    """Off the middle between two points by more than the noise, logits give the same bytes."""
    points = torch.randint(-100, 100, (2, 50, 30)).float() / reference.LOGIT_SCALE
    drawn = torch.randint(30, (2, 50))
    noisy = points + torch.rand_like(points) * 0.01 - 0.005
    streams = ops.ac_encode_logits(drawn, points)
    assert torch.equal(ops.ac_decode_logits(streams, noisy), drawn)


def test_model_id() -> None:
    cdf, drawn = random_cdf(2, 9, 5), torch.randint(5, (2, 9))
    streams = ops.ac_encode(drawn, cdf, model_id=2**63 - 1)
    assert streams.to_bytes() == encode_all(drawn, cdf, model_id=2**63 - 1)
    assert torch.equal(ops.ac_decode(streams, cdf, model_id=2**63 - 1), drawn)


# ---- adaptive models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1])
def test_adaptive_streams_are_the_references(isa: str, order: int) -> None:
    text = Path(__file__).read_bytes()[:2000]
    for data in (b"", b"a", b"\xff\x00", bytes(range(256)) * 2, b"ab" * 300, text):
        rows = (
            torch.frombuffer(bytearray(data * 3), dtype=torch.uint8).view(3, -1) if data else torch.empty(3, 0).byte()
        )
        streams = ops.ac_encode_bytes(rows, order=order)
        assert streams.to_bytes() == [reference.encode_bytes(data, order)] * 3
        assert torch.equal(ops.ac_decode_bytes(streams), rows)
        assert ops.ac_encode_bytes(rows.T.contiguous().T, order=order).to_bytes() == streams.to_bytes()


def test_golden_adaptive_streams() -> None:
    data = torch.frombuffer(bytearray(b"abracadabra, abracadabra"), dtype=torch.uint8)[None]
    for order, stream in enumerate(ADAPTIVE):
        assert ops.ac_encode_bytes(data, order=order).to_bytes()[0].hex() == stream
        assert torch.equal(ops.ac_decode_bytes(Bitstreams.from_bytes([bytes.fromhex(stream)])), data)


def test_adaptive_models_learn() -> None:
    """Text: order 0 near the entropy of its bytes, order 1 far below."""
    text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].glob("*/test_*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)[None]
    share = torch.bincount(data[0].long()).double() / len(text)
    entropy = float(-(share[share > 0] * share[share > 0].log2()).sum())
    sizes = [8 * ops.ac_encode_bytes(data, order=order).nbytes / len(text) for order in (0, 1)]
    assert sizes[0] < entropy * 1.05 and sizes[1] < entropy * 0.8


def test_damaged_adaptive_streams(isa: str) -> None:
    data = torch.frombuffer(bytearray(b"abracadabra"), dtype=torch.uint8)[None]
    for order in (0, 1):
        stream = ops.ac_encode_bytes(data, order=order).to_bytes()[0]
        for length in range(len(stream)):
            with pytest.raises(BitstreamError, match=r"^ac_decode_bytes: streams\[0\] is truncated$"):
                ops.ac_decode_bytes(Bitstreams.from_bytes([stream[:length]]))
        for bit in range(8 * len(stream)):
            damaged = bytearray(stream)
            damaged[bit // 8] ^= 1 << bit % 8
            with pytest.raises(BitstreamError, match=r"^ac_decode_bytes: streams\[0\] "):
                ops.ac_decode_bytes(Bitstreams.from_bytes([damaged]))
        with pytest.raises(
            BitstreamError, match=r"streams\[0\] is of another kind \([12]\), which another decoder reads"
        ):
            ops.ac_decode(Bitstreams.from_bytes([stream]), random_cdf(256))
    with pytest.raises(BitstreamError, match=r"streams\[0\] is of another kind \(0\), which another decoder reads"):
        ops.ac_decode_bytes(ops.ac_encode(data, random_cdf(256)))


def test_adaptive_errors() -> None:
    data = torch.zeros(1, 3, dtype=torch.uint8)
    for call, error, sentence in (
        (lambda: ops.ac_encode_bytes(b"abc"), TypeError, "ac_encode_bytes: data is a bytes and must be a Tensor"),
        (lambda: ops.ac_encode_bytes(data[0]), ValueError, r"data has shape \[3\] and must be \[streams, length\]"),
        (lambda: ops.ac_encode_bytes(data.int()), ValueError, "data has dtype int32 and must have uint8"),
        (lambda: ops.ac_encode_bytes(data, order=2), ValueError, "order is 2 and must be 0 or 1"),
        (lambda: ops.ac_encode_bytes(data, order="a"), TypeError, "order is a str and must be an int"),
        (lambda: ops.ac_decode_bytes(data), TypeError, "ac_decode_bytes: streams is a Tensor and must be a Bitstreams"),
    ):
        with pytest.raises(error, match=sentence):
            call()


# ---- Bitstreams ------------------------------------------------------------------------------------------------------


def test_bitstreams() -> None:
    cdf = random_cdf(5)
    symbols = torch.randint(5, (3, 70))
    streams = ops.ac_encode(symbols, cdf)
    parts = streams.to_bytes()
    assert len(streams) == len(parts) == 3 and streams.nbytes == sum(map(len, parts))
    assert repr(streams) == f"Bitstreams(3 streams, {streams.nbytes} bytes)"
    again = Bitstreams.from_bytes([memoryview(parts[2]), bytearray(parts[0])])
    assert again.to_bytes() == [parts[2], parts[0]]
    assert torch.equal(ops.ac_decode(again, cdf), symbols[[2, 0]])
    empty = Bitstreams.from_bytes([])
    assert empty.to_bytes() == [] and empty.nbytes == len(empty) == 0
    assert ops.ac_decode(empty, cdf).shape == (0, 0)
    assert ops.ac_encode(symbols[:0], cdf).to_bytes() == []


# ---- torch's transforms ----------------------------------------------------------------------------------------------


def test_opcheck() -> None:
    logits, drawn = torch.randn(2, 6, 5), torch.randint(5, (2, 6))
    cdf = ops.quantize_cdf(logits=logits)
    torch.library.opcheck(kernels.quantize_cdf, (logits, True, 16))
    torch.library.opcheck(kernels.quantize_cdf, (logits.softmax(-1), False, 12))
    for lanes in (1, 3):
        torch.library.opcheck(kernels.ac_encode, (drawn, cdf, None, lanes))
    torch.library.opcheck(kernels.ac_encode, (drawn, cdf, 7, 1))
    torch.library.opcheck(kernels.ac_encode_logits, (drawn, logits, 16, None))
    torch.library.opcheck(kernels.ac_encode_bytes, (drawn.byte(), 1))
    coded = ops.ac_encode_bytes(drawn.byte())
    torch.library.opcheck(kernels.ac_decode_bytes, (coded.data, coded.offsets))
    streams = ops.ac_encode(drawn, cdf)
    torch.library.opcheck(kernels.ac_decode, (streams.data, streams.offsets, cdf, None))
    torch.library.opcheck(kernels.ac_decode_logits, (streams.data, streams.offsets, logits, 16, None))


def round_trip(symbols: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    cdf = ops.quantize_cdf(logits=logits)
    streams = ops.ac_encode(symbols, cdf)
    return ops.ac_decode(streams, cdf), ops.ac_decode_logits(ops.ac_encode_logits(symbols, logits), logits)


def test_compile_with_a_changing_length() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(round_trip, fullgraph=True, backend=counter)
    for streams, length in ((2, 9), (2, 14), (2, 31), (2, 64)):
        symbols, logits = torch.randint(6, (streams, length)), torch.randn(streams, length, 6)
        for decoded in compiled(symbols, logits):
            assert torch.equal(decoded, symbols)
    assert counter.frame_count <= 2


def test_a_compiled_function_returns_streams() -> None:
    cdf, symbols = random_cdf(6), torch.randint(6, (2, 30))
    streams = torch.compile(lambda s: ops.ac_encode(s, cdf), fullgraph=True, backend="aot_eager")(symbols)
    assert isinstance(streams, Bitstreams)
    assert streams.to_bytes() == ops.ac_encode(symbols, cdf).to_bytes()


def test_autocast_leaves_the_coder_alone() -> None:
    logits, symbols = torch.randn(2, 9, 5), torch.randint(5, (2, 9))
    expected = ops.ac_encode_logits(symbols, logits).to_bytes()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.ac_encode_logits(symbols, logits).to_bytes() == expected


def test_vmap() -> None:
    logits = torch.randn(3, 4, 5)
    expected = ops.quantize_cdf(logits=logits)
    assert torch.equal(torch.vmap(lambda x: ops.quantize_cdf(logits=x))(logits), expected)
    assert torch.equal(torch.vmap(lambda x: ops.quantize_cdf(logits=x), in_dims=1)(logits), expected.transpose(0, 1))
    with pytest.raises(ValueError, match="^ac_encode: vmap would give streams of different lengths; put the samples"):
        torch.vmap(lambda s: ops.ac_encode(s, expected[0]).data)(torch.zeros(2, 3, 4, dtype=torch.int64))


# ---- the pybind11 face -----------------------------------------------------------------------------------------------


def test_native_is_the_same_kernel() -> None:
    native, logits, symbols = pycore.native, torch.randn(2, 30, 9), torch.randint(9, (2, 30))
    cdf = ops.quantize_cdf(logits=logits)
    assert np.array_equal(native.quantize_cdf(logits.numpy(), logits=True), cdf.numpy())
    out = torch.empty_like(cdf)
    assert native.quantize_cdf(logits.softmax(-1), precision=16, out=out, threads=2) is out
    assert torch.equal(out, ops.quantize_cdf(logits.softmax(-1)))
    expected = ops.ac_encode(symbols, cdf, lanes=2)
    data, offsets = native.ac_encode(symbols.numpy(), cdf.numpy(), lanes=2)
    assert np.array_equal(data, expected.data.numpy()) and np.array_equal(offsets, expected.offsets.numpy())
    assert np.array_equal(native.ac_decode(data, offsets, cdf, threads=1), symbols.numpy())
    reverse = np.ascontiguousarray(cdf.numpy()[:, ::-1])[:, ::-1]  # a negative stride
    assert np.array_equal(native.ac_decode(data, offsets, reverse), symbols.numpy())
    data, offsets = native.ac_encode_logits(symbols.numpy().astype(np.int16), logits, model_id=3)
    decoded = np.empty((2, 30), dtype=np.int64)
    assert native.ac_decode_logits(data, offsets, logits.numpy(), model_id=3, out=decoded) is decoded
    assert np.array_equal(decoded, symbols.numpy())
    raw = symbols.byte().numpy()
    data, offsets = native.ac_encode_bytes(raw, order=1, threads=2)
    assert np.array_equal(native.ac_decode_bytes(data, offsets), raw)
    data, offsets = native.ac_encode(symbols, cdf)
    with pytest.raises(pycore.BitstreamError, match=r"^ac_decode: streams\[1\] is truncated$"):
        native.ac_decode(data, offsets - np.array([0, 0, 1]), cdf)

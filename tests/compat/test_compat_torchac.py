# SPDX-License-Identifier: Apache-2.0
"""pycore.compat.torchac: streams torchac wrote, layouts it gets wrong, and, where it is installed, torchac itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import pycore
from pycore import BitstreamError
from pycore.compat import torchac

# Bytes that torchac 0.9.3 gave for these inputs.
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "torchac.json").read_text())
INTEGERS, FLOATING = GOLDEN[:-1], GOLDEN[-1]


def int16(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).to(torch.int16)  # 2^16 becomes 0


def random_rows(count: int, symbols: int, sharpness: float = 3.0) -> tuple[Tensor, Tensor]:
    """Floating cumulative distributions [count, symbols + 1], and symbols drawn from them."""
    probs = (torch.randn(count, symbols) * sharpness).softmax(-1)
    cdf = torch.cat([torch.zeros(count, 1), probs.cumsum(-1)], -1).clamp(0, 1)
    return cdf, torch.multinomial(probs, 1)[:, 0].to(torch.int16) if count else torch.zeros(0, dtype=torch.int16)


@pytest.mark.parametrize("case", INTEGERS, ids=lambda case: case["name"])
def test_streams_that_torchac_wrote(case: dict) -> None:
    cdf, sym = int16(case["cdf"]), int16(case["sym"])
    assert torchac.encode_int16_normalized_cdf(cdf, sym).hex() == case["stream"]
    decoded = torchac.decode_int16_normalized_cdf(cdf, bytes.fromhex(case["stream"]))
    assert decoded.dtype == torch.int16 and torch.equal(decoded, sym)


def test_floating_streams_that_torchac_wrote() -> None:
    cdf, sym = torch.tensor(FLOATING["float_cdf"]), int16(FLOATING["sym"])
    for normalize, name in ((True, "stream"), (False, "stream_as_is")):
        assert torchac.encode_float_cdf(cdf, sym, needs_normalization=normalize).hex() == FLOATING[name]
        decoded = torchac.decode_float_cdf(cdf, bytes.fromhex(FLOATING[name]), needs_normalization=normalize)
        assert torch.equal(decoded, sym)


@pytest.mark.parametrize("count, symbols", [(0, 3), (1, 1), (1, 2), (113, 17), (500, 256), (40, 5000), (3, 32767)])
def test_round_trip(count: int, symbols: int) -> None:
    for sharpness in (0.0, 3.0, 30.0):
        cdf, sym = random_rows(count, symbols, sharpness)
        stream = torchac.encode_float_cdf(cdf, sym, check_input_bounds=True)
        assert torch.equal(torchac.decode_float_cdf(cdf, stream), sym)


def test_any_strides() -> None:
    """Transposed, with steps, expanded: the stream of the contiguous copy."""
    cdf, sym = random_rows(60, 9)
    cdf, sym = cdf.view(5, 12, 10), sym.view(5, 12)
    stream = torchac.encode_float_cdf(cdf, sym)
    for layout in (
        cdf.transpose(0, 1).contiguous().transpose(0, 1),
        cdf.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    ):
        assert not layout.is_contiguous()
        assert torchac.encode_float_cdf(layout, sym) == stream
        assert torch.equal(torchac.decode_float_cdf(layout, stream), sym)
        integers = int16(cdf.mul(65536 - 9).round().int().add(torch.arange(10, dtype=torch.int32)).tolist())
        strided = integers.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        assert torchac.encode_int16_normalized_cdf(strided, sym.T.contiguous().T) == stream
        assert torch.equal(torchac.decode_int16_normalized_cdf(strided, stream), sym)
    row = integers[0, 0]
    expected = torchac.encode_int16_normalized_cdf(row.expand(5, 12, 10).contiguous(), sym)
    assert torchac.encode_int16_normalized_cdf(row.expand(5, 12, 10), sym) == expected
    assert torch.equal(torchac.decode_int16_normalized_cdf(row.expand(5, 12, 10), expected), sym)


def test_streams_of_the_wrong_length() -> None:
    """The format has no checksum, but the symbols say how many bytes there are: nothing longer passes."""
    cdf, sym = random_rows(50, 20)
    stream = torchac.encode_float_cdf(cdf, sym)
    for other in (stream + b"\0", stream + b"\xff", stream * 2, stream + bytes(100)):
        with pytest.raises(
            BitstreamError, match="^torchac_decode: byte_stream is truncated or has bytes after its end$"
        ):
            torchac.decode_float_cdf(cdf, other)
    with pytest.raises(BitstreamError, match="^torchac_decode: byte_stream is truncated or has bytes after its end$"):
        torchac.decode_float_cdf(cdf, stream[: len(stream) // 2])


def test_noise_does_no_harm() -> None:
    """Any bytes and any rows: symbols of the alphabet, or an error."""
    for _ in range(300):
        rows = torch.randint(-(2**15), 2**15, (20, 6)).to(torch.int16)
        if torch.rand(()) < 0.5:
            rows = int16(rows.int().sort(-1).values.clamp(min=0).tolist())
        noise = bytes(torch.randint(256, (int(torch.randint(60, ())),)).tolist())
        try:
            decoded = torchac.decode_int16_normalized_cdf(rows, noise)
        except ValueError:
            continue
        assert 0 <= int(decoded.min()) and int(decoded.max()) < 5


def test_opcheck_and_native() -> None:
    cdf, sym = int16([[0, 9, 65000, 65536]] * 3), int16([0, 1, 2])
    torch.library.opcheck(torch.ops.pycore.torchac_encode, (cdf, sym))
    stream = torch.ops.pycore.torchac_encode(cdf, sym)
    torch.library.opcheck(torch.ops.pycore.torchac_decode, (cdf, stream))
    native = pycore.native
    data = native.torchac_encode(cdf.numpy().view(np.uint16), sym.numpy())
    assert data.tobytes() == torchac.encode_int16_normalized_cdf(cdf, sym) == stream.numpy().tobytes()
    assert np.array_equal(native.torchac_decode(cdf, data), sym.numpy())


CDF, SYM = torch.tensor([[0.0, 0.5, 1.0]] * 2), int16([0, 1])
ROWS = int16([[0, 5, 9, 65536]] * 2)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda: torchac.encode_float_cdf([0], SYM),
            TypeError,
            "encode_float_cdf: cdf_float is a list and must be a Ten",
        ),
        (lambda: torchac.encode_float_cdf(CDF.double(), SYM), ValueError, "cdf_float has dtype float64 and must have"),
        (
            lambda: torchac.encode_float_cdf(CDF[0, 0], SYM),
            ValueError,
            r"cdf_float has shape \[\] and must be \[..., sym",
        ),
        (
            lambda: torchac.encode_float_cdf(CDF * 2, SYM),
            ValueError,
            r"has NaN or values outside \[0, 1\] and must not",
        ),
        (lambda: torchac.encode_float_cdf(CDF * torch.nan, SYM), ValueError, "has NaN or values outside"),
        (lambda: torchac.encode_float_cdf(CDF.flip(-1), SYM), ValueError, "row 0 of cdf falls somewhere and must not"),
        (lambda: torchac.encode_float_cdf(CDF, SYM.long()), ValueError, "sym has dtype int64 and must have int16"),
        (
            lambda: torchac.encode_float_cdf(CDF, SYM[:1]),
            ValueError,
            r"sym has shape \[1\], which is not that of cdf's",
        ),
        (lambda: torchac.encode_float_cdf(CDF, SYM + 1), IndexError, "symbol 1 is 2, which cdf does not have"),
        (lambda: torchac.encode_float_cdf(CDF, SYM - 1), IndexError, "symbol 0 is -1, which cdf does not have"),
        (
            lambda: torchac.encode_int16_normalized_cdf(int16([[0, 5, 5, 65536]] * 2), SYM),
            ValueError,
            "symbol 1 is 1, which cdf gives no share and so cannot be coded",
        ),
        (lambda: torchac.encode_int16_normalized_cdf(ROWS.int(), SYM), ValueError, "cdf has dtype int32 and must have"),
        (lambda: torchac.encode_int16_normalized_cdf(ROWS, None), TypeError, "sym is a NoneType and must be a Tensor"),
        (lambda: torchac.decode_int16_normalized_cdf(ROWS, "a"), TypeError, "byte_stream is a str and must be bytes"),
        (
            lambda: torchac.decode_int16_normalized_cdf(torch.zeros(1, 32770, dtype=torch.int16), b""),
            ValueError,
            "cdf has 32769 symbols and may have 32767",
        ),
    ],
)
def test_errors(call: Callable[[], object], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        call()


@pytest.mark.slow
def test_torchac_itself() -> None:
    """Byte for byte in both directions, on a few hundred random inputs."""
    theirs = pytest.importorskip("torchac", reason="torchac is not installed")
    for _ in range(300):
        count, symbols = int(torch.randint(1, 200, ())), int(torch.randint(1, 300, ()))
        cdf, sym = random_rows(count, symbols, float(torch.rand(()) * 12))
        stream = torchac.encode_float_cdf(cdf, sym)
        assert stream == theirs.encode_float_cdf(cdf, sym)
        assert torch.equal(theirs.decode_float_cdf(cdf, stream), sym)
        assert torch.equal(torchac.decode_float_cdf(cdf, stream), sym)

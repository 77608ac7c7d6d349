# SPDX-License-Identifier: Apache-2.0
"""What the vq ops refuse, in both faces, and with what sentence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pycore
from pycore import ops

X, BOOK, BOOKS = torch.zeros(4, 6), torch.zeros(5, 6), torch.zeros(3, 5, 6)
CODES = torch.zeros(4, 3, dtype=torch.int64)
NAN, INF = float("nan"), float("inf")

ENCODE = [
    ((X, BOOK), {"topk": 0}, "topk is 0 and must be 1 to codebook's 5 codes"),
    ((X, BOOK), {"topk": 6}, "topk is 6 and must be 1 to codebook's 5 codes"),
    ((X, BOOK), {"metric": "dot"}, "metric is 'dot' and must be euclidean or cosine"),
    ((X.double(), BOOK), {}, "x has dtype float64 and must have float32, bfloat16 or float16"),
    ((X, BOOK.double()), {}, "codebook has dtype float64 and must have float32, bfloat16 or float16"),
    ((X[:, :5], BOOK), {}, "x has 5 channels and must have codebook's 6"),
    ((X, BOOK[0]), {}, r"codebook has shape \[6\] and must be \[codes, channels\] or \[books, codes, channels\]"),
    ((X, BOOK[:0]), {}, r"codebook has shape \[0, 6\] and must have a code"),
    ((X, BOOKS), {}, r"x has shape \[4, 6\] and must have codebook's 3 books in its last dimension but one"),
    ((X[0, 0], BOOK), {}, r"x is a scalar and must have shape \[..., D\]"),
    ((X[:, :0], BOOK[:, :0]), {}, r"codebook has shape \[5, 0\] and must have a channel"),
]  # fmt: skip

RVQ = [
    ((X, BOOKS), {"num_quantizers": 0}, "num_quantizers is 0 and must be 1 to codebooks' 3 stages"),
    ((X, BOOKS), {"num_quantizers": 4}, "num_quantizers is 4 and must be 1 to codebooks' 3 stages"),
    ((X, BOOKS), {"beam_size": 0}, "beam_size is 0 and must be 1 to 16"),
    ((X, BOOKS), {"beam_size": 17}, "beam_size is 17 and must be 1 to 16"),
    ((X, BOOK), {}, r"codebooks has shape \[5, 6\] and must be \[stages, codes, channels\]"),
    ((X, BOOKS), {"channel_masks": torch.zeros(4, 6)},
     r"channel_masks has shape \[4, 6\] and must be \[at most 3 stages, 6 channels\]"),
    ((X, BOOKS), {"channel_masks": torch.full((1, 6), NAN)}, "channel_masks has nan for stage 0 and must be finite"),
    ((X, BOOKS), {"metric": ""}, "metric is '' and must be euclidean or cosine"),
]  # fmt: skip


@pytest.mark.parametrize("args, keywords, message", ENCODE, ids=[message[:40] for _, _, message in ENCODE])
def test_vq_encode(args: tuple, keywords: dict, message: str) -> None:
    for function in (ops.vq_encode, pycore.native.vq_encode):
        with pytest.raises(ValueError, match=f"^vq_encode: {message}$"):
            function(*args, **keywords)


@pytest.mark.parametrize("args, keywords, message", RVQ, ids=[message[:40] for _, _, message in RVQ])
def test_rvq_encode(args: tuple, keywords: dict, message: str) -> None:
    for function in (ops.rvq_encode, pycore.native.rvq_encode):
        with pytest.raises(ValueError, match=f"^rvq_encode: {message}$"):
            function(*args, **keywords)


@pytest.mark.parametrize("rows", [1, 50], ids=["few", "many"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("channels", [5, 40])
def test_not_finite(isa: str, rows: int, value: float, channels: int) -> None:
    x, book = torch.randn(rows, channels), torch.randn(70, channels)
    bad = x.clone()
    bad[rows - 1, 3] = value
    for metric in ("euclidean", "cosine"):
        with pytest.raises(
            ValueError, match=f"^vq_encode: x has NaN or an infinity in row {rows - 1} and must be finite$"
        ):
            ops.vq_encode(bad, book, metric=metric)
    worse = book.clone()
    worse[17, 4] = value
    with pytest.raises(ValueError, match="^vq_encode: codebook has NaN or an infinity in code 17 and must be finite$"):
        ops.vq_encode(x, worse)
    with pytest.raises(
        ValueError, match="^rvq_encode: codebooks has NaN or an infinity in code 17 of stage 1 and must be finite$"
    ):
        ops.rvq_encode(x, torch.stack([book, worse]))
    out = np.full((rows, 1), 7, dtype=np.int64)
    with pytest.raises(ValueError, match="^vq_encode: x has NaN"):
        pycore.native.vq_encode(bad, book, out=out)
    assert (out == 7).all(), "an error leaves the result as it was"


@pytest.mark.parametrize("rows", [1, 50], ids=["few", "many"])
def test_overflow(isa: str, rows: int) -> None:
    x = torch.full((rows, 8), 3e19)
    message = (
        "^vq_encode: x has row 0 so far from every code that float32 does not hold the distance, and must be nearer$"
    )
    with pytest.raises(ValueError, match=message):
        ops.vq_encode(x, torch.randn(40, 8))
    assert ops.vq_encode(x, x[:1].repeat(3, 1)).eq(0).all()


def test_codes() -> None:
    for value, text in ((5, "5"), (-2, "-2"), (2**62, str(2**62))):
        codes = CODES.clone()
        codes[1, 2] = value
        for function in (ops.rvq_decode, pycore.native.rvq_decode):
            with pytest.raises(IndexError, match=f"^rvq_decode: codes has {text} at stage 2 and must have -1 to 4$"):
                function(codes, BOOKS)
        for function in (ops.vq_statistics, pycore.native.vq_statistics):
            with pytest.raises(IndexError, match=f"^vq_statistics: codes has {text} and must have -1 to 4$"):
                function(torch.zeros(4, 3, 6), codes, 5)
    with pytest.raises(IndexError, match="^rvq_decode: codes has 4 at stage 1 and must have -1 to 2$"):
        ops.rvq_decode(torch.full((2, 2), 4), [BOOK, BOOK[:3]])
    with pytest.raises(ValueError, match="^rvq_decode: codes has 4 stages and must have at most codebooks' 3$"):
        ops.rvq_decode(torch.zeros(2, 4, dtype=torch.int64), BOOKS)
    with pytest.raises(ValueError, match="^rvq_decode: codes has dtype float32 and must have int64$"):
        ops.rvq_decode(CODES.float(), BOOKS)
    with pytest.raises(ValueError, match=r"^vq_statistics: codes has shape \[4, 3\] and must have \[4\]"):
        ops.vq_statistics(X, CODES, 5)
    with pytest.raises(ValueError, match="^vq_statistics: codebook_size is 0 and must be at least 1$"):
        ops.vq_statistics(X, CODES[:, 0], 0)


def test_codebook_lists() -> None:
    with pytest.raises(ValueError, match="^rvq_encode: codebooks has no stages and must have one at least$"):
        ops.rvq_encode(X, [])
    with pytest.raises(
        ValueError, match=r"^rvq_encode: codebooks\[1\] has 5 channels and must have 6, as codebooks\[0\]$"
    ):
        ops.rvq_encode(X, [BOOK, BOOK[:, :5]])
    with pytest.raises(ValueError, match=r"^rvq_decode: codebooks\[1\] has shape \[0, 6\] and must have a code$"):
        ops.rvq_decode(CODES, [BOOK, BOOK[:0]])
    with pytest.raises(
        ValueError, match=r"^rvq_encode: codebooks\[1\] is torch.float16 on cpu and must be torch.float32"
    ):
        ops.rvq_encode(X, [BOOK, BOOK.half()])
    with pytest.raises(ValueError, match=r"^rvq_decode: channel_masks has shape \[6\] and must be"):
        ops.rvq_decode(CODES, BOOKS, channel_masks=torch.ones(6))
    for sizes, message in (
        ([5, 5], "sizes has 2 entries"),
        ([5, 0, 5], "sizes has 0 for stage 1"),
        ([5, 5, 6], "sizes has 6"),
    ):
        with pytest.raises(ValueError, match=f"^rvq_encode: {message}"):
            pycore.native.rvq_encode(X, BOOKS, sizes=sizes)


def test_types() -> None:
    with pytest.raises(TypeError, match="^vq_encode: x is a list and must be a Tensor$"):
        ops.vq_encode([1.0], BOOK)
    with pytest.raises(TypeError, match="^vq_encode: topk is a float and must be an int$"):
        ops.vq_encode(X, BOOK, topk=1.0)
    with pytest.raises(TypeError, match=r"^rvq_encode: codebooks\[0\] is a int and must be a Tensor$"):
        ops.rvq_encode(X, [1])
    with pytest.raises(TypeError, match="^rvq_encode: beam_size is a bool and must be an int$"):
        ops.rvq_encode(X, BOOKS, beam_size=True)
    with pytest.raises(TypeError, match="^rvq_encode: metric is a int and must be a str$"):
        ops.rvq_encode(X, BOOKS, metric=3)

# SPDX-License-Identifier: Apache-2.0
"""ArithmeticEncoder and ArithmeticDecoder: the batched ops' bytes a few symbols at a time, and what misuse gets."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

import pycore
from pycore import ArithmeticDecoder, ArithmeticEncoder, BitstreamError, ops
from pycore.reference import arithmetic_coding as reference
from tests.support.coder_inputs import random_cdf

CDF = ops.quantize_cdf(torch.tensor([0.5, 0.2, 0.2, 0.1]))


@pytest.mark.parametrize("precision", [10, 16, 24])
def test_the_same_bytes(precision: int) -> None:
    """One by one, in pieces and at once; ints, NumPy and torch; int32 and uint16 rows of any strides."""
    cdf, symbols = random_cdf(50, 9, precision=precision), torch.randint(9, (50,))
    expected = ops.ac_encode(symbols[None], cdf).to_bytes()[0]
    encoder = ArithmeticEncoder()
    for i in range(20):
        encoder.encode(int(symbols[i]), cdf[i])
    encoder.encode(symbols[20:30].numpy().astype(np.uint8), cdf[20:30].numpy())
    encoder.encode(symbols[30:30], cdf[30:30]).encode(symbols[30:], cdf.T.contiguous().T[30:])
    assert len(encoder) == 50
    assert encoder.finish() == expected == reference.encode(symbols.tolist(), cdf.tolist())

    decoder = ArithmeticDecoder(expected)
    assert len(decoder) == decoder.remaining == 50
    first = [decoder.decode(cdf[i]) for i in range(20)]
    assert all(type(symbol) is int for symbol in first) and decoder.remaining == 30
    rest = np.concatenate([decoder.decode(cdf[20:45]), decoder.decode(cdf.numpy()[45:])])
    assert [*first, *rest] == symbols.tolist()
    decoder.finish()
    decoder.finish()


def test_one_row_for_many() -> None:
    symbols = torch.randint(4, (200,))
    for cdf in (CDF, CDF.to(torch.uint16), CDF.expand(200, 5), CDF[None]):
        stream = ArithmeticEncoder().encode(symbols, cdf).finish()
        assert stream == ops.ac_encode(symbols[None], CDF).to_bytes()[0]
        assert np.array_equal(ArithmeticDecoder(stream).decode(cdf, count=200), symbols.numpy())


def test_empty_stream_and_model_id() -> None:
    stream = ArithmeticEncoder(model_id=9).finish()
    assert stream == reference.encode([], [], model_id=9)
    ArithmeticDecoder(stream, model_id=9).finish()
    assert ArithmeticEncoder().finish() == reference.encode([], [])
    with pytest.raises(BitstreamError, match="^ArithmeticDecoder: data was coded with another model$"):
        ArithmeticDecoder(stream)


def test_long_carries() -> None:
    """Words of ones, which a carry at the end turns into zeros."""
    cdf = torch.tensor([0, 32767, 32769, 65536], dtype=torch.int32)
    symbols = torch.tensor([1] * 500 + [2])
    stream = ArithmeticEncoder().encode(symbols, cdf).finish()
    assert (
        stream
        == ops.ac_encode(symbols[None], cdf).to_bytes()[0]
        == reference.encode(symbols.tolist(), [cdf.tolist()] * 501)
    )
    assert bytes(900) in stream
    stream = ArithmeticEncoder().encode(symbols[:-1], cdf).finish()
    assert stream == ops.ac_encode(symbols[None, :-1], cdf).to_bytes()[0]
    assert b"\xff" * 900 in stream


def test_a_call_that_raises_changes_nothing() -> None:
    encoder = ArithmeticEncoder().encode(torch.tensor([0, 1]), CDF)
    with pytest.raises(IndexError, match=r"^ArithmeticEncoder: symbols\[2\] is 4 and must be 0 to 3$"):
        encoder.encode(torch.tensor([1, 2, 4]), CDF)
    assert len(encoder) == 2
    assert encoder.encode(3, CDF).finish() == ops.ac_encode(torch.tensor([[0, 1, 3]]), CDF).to_bytes()[0]

    decoder = ArithmeticDecoder(ops.ac_encode(torch.tensor([[0, 1, 3]]), CDF).to_bytes()[0])
    with pytest.raises(ValueError, match=r"^ArithmeticDecoder: cdf\[1\] is no cumulative distribution"):
        decoder.decode(torch.stack([CDF, CDF.flip(0)]))
    with pytest.raises(BitstreamError, match="^ArithmeticDecoder: data was coded with another model$"):
        decoder.decode(random_cdf(4))
    assert decoder.remaining == 3 and decoder.decode(CDF, 3).tolist() == [0, 1, 3]


def test_what_finish_says() -> None:
    stream = ops.ac_encode(torch.tensor([[0, 1, 3]]), CDF).to_bytes()[0]
    decoder = ArithmeticDecoder(stream)
    decoder.decode(CDF)
    with pytest.raises(BitstreamError, match="^ArithmeticDecoder: data has 3 symbols and 1 were decoded$"):
        decoder.finish()
    with pytest.raises(BitstreamError, match="data has 3 symbols, 2 of them left, and 3 are asked for"):
        decoder.decode(CDF, count=3)
    other = torch.tensor([0, 1, 2, 3, 65536], dtype=torch.int32)
    assert decoder.decode(other, count=2).tolist() != [1, 3]
    with pytest.raises(BitstreamError, match="data was coded with other distributions: the symbols' checksum"):
        decoder.finish()


def test_finish_is_once() -> None:
    encoder = ArithmeticEncoder().encode(1, CDF)
    encoder.finish()
    with pytest.raises(ValueError, match=r"finish\(\) was called before: a stream is finished once"):
        encoder.finish()
    with pytest.raises(ValueError, match=r"encode\(\) after finish\(\): a stream is finished once"):
        encoder.encode(1, CDF)


@pytest.mark.parametrize(
    ("symbols", "cdf", "error", "sentence"),
    [
        (-1, CDF, IndexError, r"symbols\[0\] is -1 and must be 0 to 3"),
        (1 << 70, CDF, IndexError, r"symbols\[0\] is beyond every cdf"),
        (1.5, CDF, TypeError, "symbols is float and must be a NumPy array or a DLPack tensor"),
        (torch.tensor([1.0]), CDF, ValueError, "symbols has dtype float32 and must have an integer dtype"),
        (
            torch.zeros(2, 2, dtype=torch.int64),
            CDF,
            ValueError,
            r"symbols has shape \[2, 2\] and must be an int or \[len",
        ),
        (1, CDF.long(), ValueError, "cdf has dtype int64 and must have int32 or uint16"),
        (1, CDF[None, None], ValueError, r"cdf has shape \[1, 1, 5\] and must be \[symbols \+ 1\] or \[length"),
        (1, CDF.expand(3, 5), ValueError, "cdf has 3 rows and must have 1 or 1, one for each symbol"),
        (1, CDF + 1, ValueError, r"cdf\[0\] is no cumulative distribution: it must rise from 0 to a power of two"),
        (1, torch.tensor([0, 4, 4, 8], dtype=torch.int32), ValueError, r"symbols\[0\] is 1, which cdf gives no share"),
        (1, [0, 8], TypeError, "cdf is list and must be a NumPy array or a DLPack tensor"),
    ],
)
def test_errors(symbols: object, cdf: object, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=f"^ArithmeticEncoder: {sentence}"):
        ArithmeticEncoder().encode(symbols, cdf)


def test_errors_of_the_decoder() -> None:
    laned = ops.ac_encode(torch.zeros(1, 9, dtype=torch.int64), CDF, lanes=2).to_bytes()[0]
    with pytest.raises(
        ValueError, match="^ArithmeticDecoder: data has 2 lanes and must have 1: decode it with ac_decode"
    ):
        ArithmeticDecoder(laned)
    with pytest.raises(BitstreamError, match="^ArithmeticDecoder: data is truncated$"):
        ArithmeticDecoder(b"")
    with pytest.raises(ValueError, match="^ArithmeticDecoder: model_id is -1 and must be"):
        ArithmeticDecoder(laned, model_id=-1)
    decoder = ArithmeticDecoder(ops.ac_encode(torch.zeros(1, 9, dtype=torch.int64), CDF).to_bytes()[0])
    with pytest.raises(ValueError, match="^ArithmeticDecoder: count is -1 and must not be negative"):
        decoder.decode(CDF, count=-1)


def test_a_symbol_at_a_time_costs_the_same_in_a_long_stream() -> None:
    """The stream's memory grows by doubling: ten times the symbols take about ten times the time."""
    row = np.array([0, 1, 1 << 24], np.int32)  # three bytes a symbol of the four that a call may need

    def seconds(calls: int) -> float:
        encoder = ArithmeticEncoder(model_id=0)
        for _ in range(calls):
            encoder.encode(np.zeros(4096, np.uint8), row)
        begin = time.perf_counter()
        for _ in range(400):
            encoder.encode(np.zeros(40, np.uint8), row)
        return time.perf_counter() - begin

    assert min(seconds(400) for _ in range(3)) < 10 * min(seconds(1) for _ in range(3))


def test_threads_take_turns() -> None:
    encoder = ArithmeticEncoder()
    team = [threading.Thread(target=lambda: [encoder.encode(2, CDF) for _ in range(500)]) for _ in range(4)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    assert np.array_equal(ArithmeticDecoder(encoder.finish()).decode(CDF, 2000), np.full(2000, 2))


def test_names() -> None:
    assert pycore.ArithmeticEncoder is ArithmeticEncoder and pycore.ArithmeticDecoder is ArithmeticDecoder
    assert ArithmeticEncoder.__doc__ and ArithmeticDecoder.__doc__

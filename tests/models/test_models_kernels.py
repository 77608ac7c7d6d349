# SPDX-License-Identifier: Apache-2.0
"""Which kernels each model calls, that none calls torch's in their place, and that one wrong kernel is noticed."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pycore import BitstreamError, ops
from pycore.models.draft import NgramTable, generate
from pycore.models.language import ByteModel, shipped
from pycore.models.language_ngram import NgramByteModel
from pycore.models.lmzip import compress, decompress
from pycore.schedules import Lambda

SOURCE = Path(os.__file__).read_bytes()
TEXT = SOURCE[:300]
# What none may leave to torch: it has no fixed order of sums, or materialises what it should not.
FORBIDDEN = (
    "attention", "softmax", "mm", "matmul", "linear", "einsum", "cdist", "argmin", "norm", "rsqrt", "conv", "logsumexp",
    "searchsorted", "bucketize",
)  # fmt: skip


class Called(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@functools.cache
def packed() -> bytes:
    return compress(TEXT)


@functools.cache
def with_counts() -> NgramByteModel:
    return NgramByteModel(shipped())


@functools.cache
def packed_with_counts() -> bytes:
    return compress(TEXT, with_counts())


def run_draft() -> Any:
    return generate(shipped(), list(TEXT), 20, NgramTable.build([list(TEXT)]), nodes=8)


def run_decompress() -> bytes:
    return decompress(packed())


# A step appends and attends in one call, a long chunk and a tree in two.
BODY, STEP, CHUNK = {"invariant_linear", "rms_norm"}, {"attention_append"}, {"lambda_cache_append", "attention"}
MATRIX: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "lmzip compress": (lambda: compress(TEXT), BODY | CHUNK | {"quantize_cdf"}),
    "lmzip decompress": (run_decompress, BODY | STEP | {"quantize_cdf"}),
    "lmzip compress with counts": (
        lambda: compress(TEXT, with_counts()),
        BODY | CHUNK | {"quantize_cdf", "ngram_lookup", "ngram_update"},
    ),
    "lmzip decompress with counts": (
        lambda: decompress(packed_with_counts(), with_counts()),
        BODY | STEP | {"quantize_cdf", "ngram_lookup", "ngram_update"},
    ),
    "draft": (run_draft, BODY | CHUNK | {"ngram_update", "ngram_draft"}),
}


@pytest.mark.parametrize("name", MATRIX)
def test_the_kernels_of_a_model(name: str) -> None:
    run, expected = MATRIX[name]
    packed()
    packed_with_counts()
    with Called() as called:
        run()
    own = {x.removeprefix("pycore::") for x in called.names if x.startswith("pycore::")}
    assert own == expected
    torchs = {x.removeprefix("aten::") for x in called.names if not x.startswith("pycore::")}
    assert not [x for x in torchs if any(part in x for part in FORBIDDEN)], torchs


# ---- a kernel made wrong, and what sees it ---------------------------------------------------------------------------


def wrong_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one token are a little off, as a kernel of its own for few rows might be."""
    real = ops.invariant_linear

    def bent(x: Tensor, *args: Any, **named: Any) -> Tensor:
        out = real(x, *args, **named)
        return out * 1.0001 if x.shape[-2] == 1 else out

    monkeypatch.setattr(ops, "invariant_linear", bent)


def sink_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of one token see the window alone."""
    from pycore.cache import lambda_cache

    real = lambda_cache.append_and_attend

    def blind(*args: Any, **named: Any) -> Any:
        given = [Lambda(0, x.window_size) if isinstance(x, Lambda) else x for x in args]
        return real(*given, **named)

    monkeypatch.setattr(lambda_cache, "append_and_attend", blind)


def cdf_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    """One entry of every distribution moves by one, in decoding."""

    def shifted(*args: Any, **named: Any) -> Tensor:
        cdf = torch.ops.pycore.quantize_cdf(named["logits"], True, named["precision"])
        cdf[..., 60:101] += 1
        return cdf

    monkeypatch.setattr(ops, "quantize_cdf", shifted)


@pytest.mark.parametrize("mutation", [wrong_linear, sink_dropped, cdf_shifted])
def test_a_wrong_kernel_is_a_file_that_is_refused(
    mutation: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ByteModel(shipped().model, window_size=64)  # so that the sinks leave the window
    file = compress(TEXT, model)
    mutation(monkeypatch)
    with pytest.raises(BitstreamError):
        decompress(file, model)
    monkeypatch.undo()
    assert decompress(file, model) == TEXT


def test_a_wrong_tree_is_another_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that hang on the wrong parents: the text is no longer that of plain decoding."""
    from pycore.models import draft

    expected = run_draft().tokens
    real = draft.Tree
    monkeypatch.setattr(draft, "Tree", lambda parents: real(torch.arange(-1, len(parents) - 1)))
    assert run_draft().tokens != expected

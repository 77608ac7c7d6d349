# SPDX-License-Identifier: Apache-2.0
"""Streams of codes through a code model: several of them together, each as it would be alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pycore import ArithmeticDecoder, ArithmeticEncoder, ops

__all__ = ["decode_streams", "encode_streams"]


class Model(Protocol):
    """What is asked of `pycore.models.codec.CodeModel`."""

    def __call__(self, codes: Tensor) -> Any: ...
    def caches(self) -> Any: ...
    def context(self, codes: Tensor, caches: Any) -> Tensor: ...
    def stage(self, q: int, context: Tensor, codes: Tensor) -> Tensor: ...


def encode_streams(model: Model, codes: Sequence[Tensor], model_id: int) -> list[bytes]:
    """The stream of each of codes [t, n], of any lengths; without a gradient."""
    for each in codes:
        if each.shape[1] != codes[0].shape[1]:
            raise ValueError(
                f"Codec: codes has {each.shape[1]} codes a frame in one of the list and must have "
                f"{codes[0].shape[1]}, as the first"
            )
    longest = max(map(len, codes))
    if not longest:
        return [ArithmeticEncoder(model_id=model_id).finish() for _ in codes]
    # What pads a row comes after it, and changes nothing before.
    rows = torch.stack([functional.pad(each, (0, 0, 0, longest - len(each))) for each in codes])
    logits, rows = model(rows).flatten(1, 2), rows.flatten(1)
    if all(len(each) == longest for each in codes):
        return ops.ac_encode_logits(rows, logits, model_id=model_id).to_bytes()
    streams = []
    for row, of_row, each in zip(rows, logits, codes, strict=True):
        n = each.numel()
        streams.append(
            ops.ac_encode_logits(row[None, :n], of_row[None, :n], model_id=model_id).to_bytes()[0]
            if n
            else ArithmeticEncoder(model_id=model_id).finish()
        )
    return streams


def decode_streams(
    model: Model, decoders: Sequence[ArithmeticDecoder], frames: Sequence[int], stages: int
) -> NDArray[np.int64]:
    """Codes [streams, the most frames, stages], zeros behind a stream's end; without a gradient."""
    out = np.zeros((len(decoders), max(frames, default=0), stages), dtype=np.int64)
    # Those that go on longest come first, so that the ones in use are the first of a batch.
    order = sorted(range(len(decoders)), key=lambda row: -frames[row])
    caches = model.caches()
    newest = torch.full((len(decoders), 1, stages), -1)
    for frame in range(out.shape[1]):
        using = [row for row in order if frames[row] > frame]
        context = model.context(newest, caches)[: len(using)]
        newest = torch.zeros_like(newest)
        for q in range(stages):
            logits = model.stage(q, context, newest[: len(using)])[:, 0]
            cdf = ops.quantize_cdf(logits=logits).numpy()
            symbols = [decoders[row].decode(cdf[at]) for at, row in enumerate(using)]
            newest[: len(using), 0, q] = torch.tensor(symbols)
        out[using, frame] = newest[: len(using), 0].numpy()
    return out

# SPDX-License-Identifier: Apache-2.0
"""The segments of a text as streams of the coder, many tokens of several segments in a pass, and back, one by one."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pycore import ArithmeticDecoder, ArithmeticEncoder, ops
from pycore.models.language import LanguageModel
from pycore.models.language_ngram import NgramByteModel

__all__ = ["decode", "encode", "framed", "trim"]

FRAME = 32  # bytes in front of a stream, which a file does without
SHARES = 1 << 25  # logits, and as many shares, that exist at a time


def encode(
    language: LanguageModel, segments: Sequence[list[int]], chunk: int, tell: Callable[[int], None]
) -> list[bytes]:
    """The payload of each segment: of the streams of the coder, what follows the frame."""
    longest = max(map(len, segments))
    chunk = max(1, min(chunk, SHARES // (len(segments) * language.vocabulary)))
    tokens = torch.tensor([[language.bos, *x, *[0] * (longest - len(x))] for x in segments])
    coders = [ArithmeticEncoder(model_id=language.fingerprint) for _ in segments]
    state = language.state()
    for at in range(0, longest, chunk):
        cdf = _shares(language, tokens[:, at : min(at + chunk, longest)], state)
        symbols = tokens[:, at + 1 : at + 1 + cdf.shape[1]].numpy()
        for row, (coder, own) in enumerate(zip(coders, segments, strict=True)):
            count = min(len(own) - at, cdf.shape[1])
            if count > 0:
                coder.encode(symbols[row, :count], cdf[row, :count])
        tell(sum(min(len(x), at + chunk) for x in segments))
    return [coder.finish()[FRAME:] for coder in coders]


def decode(
    language: LanguageModel, streams: list[bytes], counts: list[int], tell: Callable[[int], None]
) -> list[list[int]]:
    """The tokens of each segment, one of every segment at a time."""
    coders = [ArithmeticDecoder(stream, model_id=language.fingerprint) for stream in streams]
    out: list[list[int]] = [[] for _ in streams]
    state = language.state()
    newest = torch.full((len(streams), 1), language.bos)
    for step in range(max(counts)):
        cdf = _shares(language, newest, state)
        for row, coder in enumerate(coders):
            if step < counts[row]:
                out[row].append(coder.decode(cdf[row, 0]))
        newest = torch.tensor([[x[-1]] for x in out])
        if step % 64 == 63:
            tell(sum(map(len, out)))
    tell(sum(map(len, out)))
    return out


def _shares(language: LanguageModel, tokens: Tensor, state: Any) -> Any:
    """Integer shares of what follows each token: of the model's probabilities where it has any, else of its logits."""
    if isinstance(language, NgramByteModel):
        return ops.quantize_cdf(language.probabilities(tokens, state), precision=None).numpy()
    return ops.quantize_cdf(logits=language.logits(tokens, state), precision=None).numpy()


def trim() -> None:
    """Gives freed memory back to the system, where the C library is GNU's.

    Its aligned allocations (2.36) do not find again what a batch before has freed: without this a text of 10 MB takes
    10 GB, and with it what one batch takes.
    """
    try:
        give_back = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    give_back(0)


def framed(payload: bytes, count: int, model_id: int) -> bytes:
    """The stream whose frame was left away; the CRC of its symbols, which is unknown, is that of the whole text."""
    rest = struct.pack("<4xQ", model_id) + count.to_bytes(6, "little") + len(payload).to_bytes(6, "little")
    front = bytes([0xAC, 1, 0x80, 1])
    return front + _crc32c(front + rest + payload).to_bytes(4, "little") + rest + payload


def _crc_table() -> list[int]:
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


_TABLE = _crc_table()


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF

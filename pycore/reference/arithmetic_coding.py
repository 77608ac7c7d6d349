# SPDX-License-Identifier: Apache-2.0
"""The coder in plain Python integers, for tests and readers: docs/formats.md, line by line. Slow."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from decimal import Decimal, localcontext

LOGIT_SCALE = float.fromhex("0x1.715476p+4")  # 16 log2(e), as a float32
LOGIT_BOUND = 1 << 21
FULL, LEAST, WORD = (1 << 64) - 1, 1 << 48, 1 << 16
MAGIC, VERSION, MODEL_ID = 0xAC, 1, 0x80


def _float32(x: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", x))[0])


def _power(f: int) -> int:
    with localcontext() as context:
        context.prec = 40
        return int((Decimal(2) ** (24 - Decimal(f) / 16)).to_integral_value())


POWERS = tuple(_power(f) for f in range(16))


def counts_of_probs(probs: Sequence[float]) -> list[int]:
    """The counts of a row of probabilities: floor(p 2^(30 - e)), 2^e the power of two at or below the largest."""
    if any(not 0 <= p < math.inf for p in probs):
        raise ValueError("a probability is negative, infinite or NaN")
    exponent = max(math.frexp(max(probs, default=0.0))[1] - 1, -1022)  # of a subnormal double: -1022
    counts = []
    for p in probs:
        numerator, denominator = p.as_integer_ratio()
        scaled = numerator << (30 - exponent) if exponent <= 30 else numerator
        counts.append(scaled // (denominator if exponent <= 30 else denominator << (exponent - 30)))
    if sum(counts) == 0:
        raise ValueError("the probabilities are all zero")
    return counts


def counts_of_logits(logits: Sequence[float]) -> list[int]:
    """The counts of a row of float32 logits, through sixteen points an octave and the table of powers."""
    if any(math.isnan(x) or x == math.inf for x in logits):
        raise ValueError("a logit is NaN or infinite")
    points = []
    for x in logits:
        y = _float32(min(max(x * LOGIT_SCALE, -LOGIT_BOUND), LOGIT_BOUND))
        points.append(round(y))  # ties to even
    highest = max(points, default=-LOGIT_BOUND)
    if highest == -LOGIT_BOUND:
        raise ValueError("the logits are all too low")
    return [POWERS[(highest - point) % 16] >> (highest - point) // 16 for point in points]


def precision_for(symbols: int) -> int:
    """The least of 16 to 24 bits at which V symbols' shares of one take 2^-14 of the whole, or 24."""
    return min(24, max(16, 14 + (symbols - 1).bit_length()))


def cdf_of_counts(counts: Sequence[int], precision: int | None = 16) -> list[int]:
    """cdf[i] = i + floor(C[i] (2^P - V) / C[V]) with C the running sums of the counts; None: P by V."""
    precision = precision_for(len(counts)) if precision is None else precision
    shared, total, running = (1 << precision) - len(counts), sum(counts), 0
    cdf = [0]
    for i, count in enumerate(counts, 1):
        running += count
        cdf.append(i + running * shared // total)
    return cdf


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def fingerprint(cdf: Sequence[int]) -> int:
    """Of a row: its entries, the last one 2^P, through a 64-bit multiplicative hash."""
    value = 0xCBF29CE484222325
    for entry in cdf:
        value = (value ^ entry) * 0x100000001B3 & FULL
    return value


def payload(symbols: Sequence[int], cdfs: Sequence[Sequence[int]]) -> bytes:
    """The range coder: the shortest fraction, in whole bytes after whole 16-bit steps, inside the final interval.

    Here `low` is one exact integer over the whole stream, in units of the last word written.
    """
    low, width, words = 0, FULL, 4
    for symbol, cdf in zip(symbols, cdfs, strict=True):
        unit = width // cdf[-1]
        low += unit * cdf[symbol]
        width = unit * (cdf[symbol + 1] - cdf[symbol])
        while width < LEAST:
            low, width, words = low * WORD, width * WORD, words + 1
    low = (low + LEAST - 1) // LEAST * LEAST
    return low.to_bytes(2 * words, "big").rstrip(b"\0")


def frame(mode: int, lanes: int, symbols: Sequence[int], model: int, body: bytes) -> bytes:
    """The 32 bytes before the payload, and the payload."""
    head = struct.pack("<BBBB", MAGIC, VERSION, mode, lanes)
    tail = struct.pack("<IQ", crc32c(struct.pack(f"<{len(symbols)}I", *symbols)), model)
    tail += len(symbols).to_bytes(6, "little") + len(body).to_bytes(6, "little")
    return head + struct.pack("<I", crc32c(head + tail + body)) + tail + body


def encode(symbols: Sequence[int], cdfs: Sequence[Sequence[int]], model_id: int | None = None, lanes: int = 1) -> bytes:
    """One stream: symbols and, for each, a row of cumulative frequencies that ends in 2^P."""
    if model_id is not None:
        mode, model = MODEL_ID, model_id
    else:
        mode, model = 0, fingerprint(cdfs[0] if cdfs else ())
    bodies = [payload(symbols[lane::lanes], cdfs[lane::lanes]) for lane in range(lanes)]
    lengths = b"".join(len(body).to_bytes(6, "little") for body in bodies[:-1])
    return frame(mode, lanes, symbols, model, lengths + b"".join(bodies))


class AdaptiveBytes:
    """The model of `encode_bytes`: contexts of sixteen symbols of four bits, precision 15."""

    def __init__(self, order: int) -> None:
        self.order, self.before = order, 0
        self.contexts: dict[tuple[int, int], tuple[list[int], int]] = {}

    def cdf(self, context: int) -> list[int]:
        """Entries 0 .. 16 of a context of the next byte: 0 for the high half, 1 + high half for the low one."""
        start = [2048 * i for i in range(16)]
        return [*self.contexts.get((self.before, context), (start, 0))[0], 1 << 15]

    def learn(self, context: int, symbol: int) -> None:
        """Moves the context towards the symbol; after the low half the byte is known."""
        key = (self.before, context)
        uses = self.contexts.get(key, ([], 0))[1]
        rate = 2 + sum(uses >= bound for bound in (2, 6, 18, 90))
        targets = [i if i <= symbol else (1 << 15) - 16 + i for i in range(16)]
        moved = [e + ((t - e) >> rate) for e, t in zip(self.cdf(context), targets, strict=False)]
        self.contexts[key] = (moved, uses + 1)
        if context > 0 and self.order:
            self.before = (context - 1) * 16 + symbol


def encode_bytes(data: bytes, order: int) -> bytes:
    """One stream of bytes, with the adaptive model of this order."""
    model = AdaptiveBytes(order)
    symbols: list[int] = []
    cdfs: list[list[int]] = []
    for byte in data:
        for context, symbol in ((0, byte >> 4), (1 + (byte >> 4), byte & 15)):
            symbols.append(symbol)
            cdfs.append(model.cdf(context))
            model.learn(context, symbol)
    return frame(1 + order, 1, list(data), fingerprint(()), payload(symbols, cdfs))


def decode_payload(body: bytes, count: int, cdfs: Sequence[Sequence[int]]) -> list[int]:
    """Inverse of `payload`."""
    number = int.from_bytes(body, "big") << 8 * (8 + 4 * count)  # words after the end are zero
    bits = 8 * (len(body) + 8 + 4 * count)
    low, width, words, symbols = 0, FULL, 4, []
    for cdf in cdfs[:count]:
        code = (number >> (bits - 16 * words)) - low
        unit = width // cdf[-1]
        symbol = next(s for s in range(len(cdf) - 1) if code // unit < cdf[s + 1])
        symbols.append(symbol)
        low += unit * cdf[symbol]
        width = unit * (cdf[symbol + 1] - cdf[symbol])
        while width < LEAST:
            low, width, words = low * WORD, width * WORD, words + 1
    return symbols


def decode(stream: bytes, cdfs: Sequence[Sequence[int]], model_id: int | None = None) -> list[int]:
    """Inverse of `encode`; ValueError for what is no whole stream of this model."""
    head, crc, tail, body = stream[:4], stream[4:8], stream[8:32], stream[32:]
    if (
        len(tail) != 24
        or head[:2] != bytes((MAGIC, VERSION))
        or crc32c(head + tail + body) != int.from_bytes(crc, "little")
    ):
        raise ValueError("the stream is damaged")
    check, model = struct.unpack("<IQ", tail[:12])
    count, lanes = int.from_bytes(tail[12:18], "little"), head[3]
    expected = model_id if model_id is not None else fingerprint(cdfs[0] if cdfs else ())
    if head[2] != (MODEL_ID if model_id is not None else 0) or model != expected:
        raise ValueError("the stream was coded with another model")
    position, symbols = 6 * (lanes - 1), [0] * count
    lengths = [int.from_bytes(body[6 * lane : 6 * lane + 6], "little") for lane in range(lanes - 1)]
    for lane in range(lanes):
        end = position + lengths[lane] if lane < lanes - 1 else len(body)
        part = cdfs[lane::lanes]
        symbols[lane::lanes] = decode_payload(body[position:end], len(range(lane, count, lanes)), part)
        position = end
    if crc32c(struct.pack(f"<{count}I", *symbols)) != check:
        raise ValueError("the stream does not decode with this model")
    return symbols

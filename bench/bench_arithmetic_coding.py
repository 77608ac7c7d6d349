# SPDX-License-Identifier: Apache-2.0
"""The coder on one core: one model for all symbols, a given distribution per symbol, logits per symbol.

Peers are constriction and torchac where they are installed, and zstd for orientation (it makes its own model). A peer's
encoding counts if its size is within 1 % of the ideal (zstd's size is its own), a decoding if all symbols are right.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from bench import inputs
from bench.case import Case, Options, Outputs, Prepare

ALPHABET, LANES = 256, 8
STATIC, ROWS, LOGITS = 1 << 18, 100_000, 1 << 16  # symbols; rows take 51 and 67 MB, more than the caches hold


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


class Static:
    """Symbols of a Zipf distribution, exponent 1.2: 5.3 bits each."""

    def __init__(self) -> None:
        from pycore import ops

        generator = torch.Generator().manual_seed(inputs.SEED)
        weights = torch.arange(1, ALPHABET + 1, dtype=torch.float64).pow(-1.2)
        self.probs = weights / weights.sum()
        self.symbols = torch.multinomial(self.probs, STATIC, replacement=True, generator=generator)
        self.cdf = ops.quantize_cdf(self.probs)
        self.ideal = float(-self.probs[self.symbols].log2().sum()) / 8


class Rows:
    """Logits that differ from symbol to symbol, their distributions, and a symbol drawn from each."""

    def __init__(self, count: int) -> None:
        from pycore import ops

        generator = torch.Generator().manual_seed(inputs.SEED)
        self.logits = torch.randn(count, ALPHABET, generator=generator) * 1.5
        self.probs = self.logits.softmax(-1)
        self.symbols = torch.multinomial(self.probs, 1, generator=generator)[:, 0]
        self.cdf = ops.quantize_cdf(logits=self.logits).to(torch.uint16)
        self.ideal = float(-self.probs.gather(1, self.symbols[:, None]).double().log2().sum()) / 8


# ---- contenders: what is prepared is not timed -----------------------------------------------------------------------


def _size(count: int) -> Outputs:
    return (torch.tensor([float(count)]),)


def _pycore(model: str, decode: bool, lanes: int = 1) -> Prepare:
    from pycore import ops

    def prepare(data: Any) -> Callable[[], Outputs]:
        symbols, shares = data.symbols[None].to(torch.int32), getattr(data, model)
        if model == "logits":
            streams = ops.ac_encode_logits(symbols, shares)
            if decode:
                return lambda: (ops.ac_decode_logits(streams, shares)[0],)
            return lambda: _size(ops.ac_encode_logits(symbols, shares).nbytes)
        streams = ops.ac_encode(symbols, shares, lanes=lanes)
        if decode:
            return lambda: (ops.ac_decode(streams, shares)[0],)
        return lambda: _size(ops.ac_encode(symbols, shares, lanes=lanes).nbytes)

    return prepare


def _constriction(coder: str, decode: bool) -> Prepare:
    def prepare(data: Any) -> Callable[[], Outputs]:
        stream = _optional("constriction").stream
        categorical = stream.model.Categorical
        if data.probs.dim() == 1:
            model = (categorical(data.probs.float().numpy(), perfect=False),)
        else:
            model = (categorical(perfect=False), data.probs.numpy())
        symbols = data.symbols.to(torch.int32).numpy()

        def encode() -> Any:
            if coder == "range":
                encoder = stream.queue.RangeEncoder()
                encoder.encode(symbols, *model)
            else:
                encoder = stream.stack.AnsCoder()
                encoder.encode_reverse(symbols, *model)
            return encoder.get_compressed()

        words = encode()
        decoder = stream.queue.RangeDecoder if coder == "range" else stream.stack.AnsCoder
        wanted = (*model, len(symbols)) if len(model) == 1 else model
        if decode:
            return lambda: (torch.from_numpy(decoder(words).decode(*wanted)),)
        return lambda: _size(4 * len(encode()))

    return prepare


def _torchac(decode: bool, name: str = "torchac") -> Prepare:
    def prepare(data: Any) -> Callable[[], Outputs]:
        torchac = importlib.import_module(name)
        cdf, symbols = data.cdf.view(torch.int16), data.symbols.to(torch.int16)
        stream = torchac.encode_int16_normalized_cdf(cdf, symbols)
        if decode:
            return lambda: (torchac.decode_int16_normalized_cdf(cdf, stream),)
        return lambda: _size(len(torchac.encode_int16_normalized_cdf(cdf, symbols)))

    return prepare


def _zstd(decode: bool) -> Prepare:
    def prepare(data: Any) -> Callable[[], Outputs]:
        zstandard = _optional("zstandard")
        raw = data.symbols.to(torch.uint8).numpy().tobytes()
        compressor, decompressor = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
        packed = compressor.compress(raw)
        if decode:
            return lambda: (torch.frombuffer(bytearray(decompressor.decompress(packed)), dtype=torch.uint8),)
        # The size of another model is no measure of the coder: the ideal stands in for it.
        return lambda: _size(data.ideal) if compressor.compress(raw) else ()

    return prepare


# ---- cases -----------------------------------------------------------------------------------------------------------


def _check_size(data: Any) -> Callable[[Outputs], float]:
    return lambda outputs: abs(float(outputs[0]) / data.ideal - 1)


def _check_symbols(data: Any) -> Callable[[Outputs], float]:
    def error(outputs: Outputs) -> float:
        symbols: Tensor = outputs[0].long()
        same = symbols.shape == data.symbols.shape and torch.equal(symbols, data.symbols)
        return 0.0 if same else float("inf")

    return error


def _case(name: str, make: Callable[[], Any], decode: bool, contenders: dict[str, Prepare], read: float = 0.0) -> Case:
    return Case(
        name=f"coder, {'decode' if decode else 'encode'}, {name}",
        group="arithmetic coding (256 symbols, one thread)",
        inputs=make,
        contenders=contenders,
        check=_check_symbols if decode else _check_size,
        tolerance=0.0 if decode else 0.01,
        bytes=read,
    )


def cases(options: Options) -> Iterable[Case]:
    """Encoding and decoding, each of the three kinds, and decoding of lanes. CPU only."""
    if options.device != "cpu":
        return
    constriction, zstd = _optional("constriction"), _optional("zstandard")
    # torchac compiles itself when it is imported, which takes most of a minute.
    torchac = None if options.quick else _optional("torchac")
    for decode in (False, True):
        contenders = {"pycore": _pycore("cdf", decode)}
        if constriction:
            contenders["constriction range"] = _constriction("range", decode)
            contenders["constriction ANS"] = _constriction("ans", decode)
        if zstd:
            contenders["zstd -1"] = _zstd(decode)
        yield _case(f"one model, {STATIC} symbols", Static, decode, contenders)
    contenders = {f"pycore, {LANES} lanes": _pycore("cdf", True, LANES)}
    if constriction:
        contenders["constriction ANS"] = _constriction("ans", True)
    yield _case(f"one model, {STATIC} symbols, {LANES} lanes", Static, True, contenders)
    for decode in (False, True):
        contenders = {"pycore": _pycore("cdf", decode)}
        contenders["pycore.compat.torchac"] = _torchac(decode, "pycore.compat.torchac")
        if torchac:
            contenders["torchac"] = _torchac(decode)
        yield _case(f"uint16 row per symbol, {ROWS} symbols", lambda: Rows(ROWS), decode, contenders, 2.0 * ROWS * 257)
    for decode in (False, True):
        contenders = {"pycore": _pycore("logits", decode)}
        if constriction:
            contenders["constriction range, probabilities"] = _constriction("range", decode)
        yield _case(f"logits per symbol, {LOGITS} symbols", lambda: Rows(LOGITS), decode, contenders)


def bench_arithmetic_coding(case: Case, measure_case: Callable[[Case], None]) -> None:
    measure_case(case)

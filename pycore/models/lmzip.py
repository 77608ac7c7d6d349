# SPDX-License-Identifier: Apache-2.0
"""Lossless compression with a language model: what it thinks likely costs few bits.

The text is cut into segments, which are read side by side, each from its own start. `compress` reads many tokens of
each in one pass; `decompress` gets them one by one, from the cache. Both see the same logits to the last bit, whatever
the chunks, the batch and the threads, and so the arithmetic coder gives back what it was given. Attention is Λ: memory
does not grow with the length.

    python -m pycore.models.lmzip compress FILE [-o OUT]      FILE or OUT may be -, standard input and output
    python -m pycore.models.lmzip decompress FILE [-o OUT]

docs/formats.md has the format. What is damaged is a BitstreamError, and nothing is written.
"""

from __future__ import annotations

import argparse
import os
import struct
import sys
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from pycore import ArithmeticDecoder, ArithmeticEncoder, BitstreamError, ops
from pycore._checks import check_bytes, check_int
from pycore.models.bytelm import Bytelm
from pycore.models.language import ByteModel, LanguageModel, load_bytelm, shipped

__all__ = ["compress", "decompress"]

MAGIC, VERSION = b"PCLZ", 1
STORED, CODED = 0, 1
HEADER = struct.Struct("<4sBBIII")  # magic, version, method, CRC of the rest, CRC of the text, fingerprint
MOST_SEGMENT = 1 << 20
SUFFIX = ".pclz"
Progress = Callable[[int, int], None]  # tokens done, tokens in all


def compress(
    data: bytes,
    model: LanguageModel | Bytelm | str | os.PathLike[str] | None = None,
    *,
    segment: int = 4096,
    batch: int = 64,
    chunk: int = 256,
    progress: Progress | None = None,
) -> bytes:
    """The bytes of `data` in fewer bytes, or stored as they are where the model knows nothing of them.

    Args:
        data: any bytes.
        model: a :class:`LanguageModel`, a :class:`Bytelm`, or the path of a checkpoint; None for the one that comes
            with pycore.
        segment: tokens that are read one after another, 1 to 2^20. More are denser, fewer decompress faster: the
            segments of a batch are read side by side.
        batch: segments that are read at a time, and
        chunk: tokens of each; the result does not depend on these two.
        progress: called with the tokens that are done and all there are.
    """
    check_bytes("compress", "data", data)
    for name, number in (("segment", segment), ("batch", batch), ("chunk", chunk)):
        check_int("compress", name, number, 1)
    if segment > MOST_SEGMENT:
        raise ValueError(f"compress: segment is {segment} and must be at most {MOST_SEGMENT}")
    data = bytes(data)
    language = _language(model)
    tokens = language.tokens(data)
    segments = [tokens[at : at + segment] for at in range(0, len(tokens), segment)]
    payloads: list[bytes] = []
    for at in range(0, len(segments), batch):
        tell = partial(_tell, progress, at * segment, len(tokens))
        payloads += _encode(language, segments[at : at + batch], chunk, tell)
    body = _number(len(tokens)) + _number(segment) + b"".join(_number(len(x)) for x in payloads) + b"".join(payloads)
    method, fingerprint = CODED, language.fingerprint
    if len(body) > len(data):
        method, fingerprint, body = STORED, 0, data
    text = zlib.crc32(data)
    check = zlib.crc32(body, zlib.crc32(HEADER.pack(MAGIC, VERSION, method, 0, text, fingerprint)))
    return HEADER.pack(MAGIC, VERSION, method, check, text, fingerprint) + body


def decompress(
    data: bytes,
    model: LanguageModel | Bytelm | str | os.PathLike[str] | None = None,
    *,
    batch: int = 64,
    progress: Progress | None = None,
) -> bytes:
    """What :func:`compress` was given.

    Args:
        data: what it returned.
        model: the model that it had.
        batch: segments that are decoded at a time; the result does not depend on it.
        progress: as for :func:`compress`.

    Raises:
        BitstreamError: data is damaged, truncated, extended, of another format, or was made with another model.
    """
    check_bytes("decompress", "data", data)
    check_int("decompress", "batch", batch, 1)
    data = bytes(data)
    if len(data) < HEADER.size or data[:4] != MAGIC:
        raise BitstreamError("decompress: data does not begin as lmzip's files do")
    _, version, method, check, text, fingerprint = HEADER.unpack_from(data)
    if version != VERSION:
        raise BitstreamError(f"decompress: data has version {version} and must have {VERSION}")
    body = data[HEADER.size :]
    if check != zlib.crc32(body, zlib.crc32(HEADER.pack(MAGIC, VERSION, method, 0, text, fingerprint))):
        raise BitstreamError("decompress: data is damaged or not whole: its CRC is another")
    if method == CODED:
        body = _decoded(body, _language(model), fingerprint, batch, progress)
    elif method != STORED:
        raise BitstreamError(f"decompress: data has method {method} and must have {STORED} or {CODED}")
    if zlib.crc32(body) != text:
        raise BitstreamError("decompress: data does not decode to what was compressed")
    return body


# ---- segments --------------------------------------------------------------------------------------------------------


def _encode(
    language: LanguageModel, segments: Sequence[list[int]], chunk: int, tell: Callable[[int], None]
) -> list[bytes]:
    """The payload of each segment: of the streams of the coder, what follows the frame."""
    longest = max(map(len, segments))
    tokens = torch.tensor([[language.bos, *x, *[0] * (longest - len(x))] for x in segments])
    coders = [ArithmeticEncoder(model_id=language.fingerprint) for _ in segments]
    state = language.state()
    for at in range(0, longest, chunk):
        logits = language.logits(tokens[:, at : min(at + chunk, longest)], state)
        cdf = ops.quantize_cdf(logits=logits, precision=None).numpy()
        symbols = tokens[:, at + 1 : at + 1 + logits.shape[1]].numpy()
        for row, (coder, own) in enumerate(zip(coders, segments, strict=True)):
            count = min(len(own) - at, cdf.shape[1])
            if count > 0:
                coder.encode(symbols[row, :count], cdf[row, :count])
        tell(sum(min(len(x), at + chunk) for x in segments))
    return [coder.finish()[32:] for coder in coders]


def _decoded(body: bytes, language: LanguageModel, fingerprint: int, batch: int, progress: Progress | None) -> bytes:
    if fingerprint != language.fingerprint:
        raise BitstreamError(
            f"decompress: data was compressed with model {fingerprint:08x} and this one is {language.fingerprint:08x}; "
            "weights, window and the bits that the machine computes must be the same"
        )
    total, at = _read_number(body, 0)
    segment, at = _read_number(body, at)
    if not 1 <= segment <= MOST_SEGMENT or -(-total // segment) > len(body):
        raise BitstreamError(f"decompress: data claims {total} tokens in segments of {segment}, which cannot be")
    counts = [min(segment, total - begin) for begin in range(0, total, segment)]
    sizes = []
    for _ in counts:
        size, at = _read_number(body, at)
        sizes.append(size)
    if at + sum(sizes) != len(body):
        raise BitstreamError("decompress: data has another length than its segments")
    streams = []
    for count, size in zip(counts, sizes, strict=True):
        streams.append(_framed(body[at : at + size], count, fingerprint))
        at += size
    tokens: list[int] = []
    for first in range(0, len(streams), batch):
        group = slice(first, first + batch)
        for row in _decode(language, streams[group], counts[group], partial(_tell, progress, len(tokens), total)):
            tokens += row
    return language.text(tokens)


def _decode(
    language: LanguageModel, streams: list[bytes], counts: list[int], tell: Callable[[int], None]
) -> list[list[int]]:
    """The tokens of each segment, one of every segment at a time."""
    coders = [ArithmeticDecoder(stream, model_id=language.fingerprint) for stream in streams]
    out: list[list[int]] = [[] for _ in streams]
    state = language.state()
    newest = torch.full((len(streams), 1), language.bos)
    for step in range(max(counts)):
        cdf = ops.quantize_cdf(logits=language.logits(newest, state), precision=None).numpy()
        for row, coder in enumerate(coders):
            if step < counts[row]:
                out[row].append(coder.decode(cdf[row, 0]))
        newest = torch.tensor([[x[-1]] for x in out])
        if step % 64 == 63:
            tell(sum(map(len, out)))
    tell(sum(map(len, out)))
    return out


def _framed(payload: bytes, count: int, model_id: int) -> bytes:
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


# ---- numbers, models -------------------------------------------------------------------------------------------------


def _number(value: int) -> bytes:
    """Seven bits a byte, the low ones first, the eighth set in all but the last."""
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _read_number(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 56:
        byte = data[at]
        at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value, at
    raise BitstreamError("decompress: data ends within a number, or one is too long")


def _language(model: LanguageModel | Bytelm | str | os.PathLike[str] | None) -> LanguageModel:
    if model is None:
        return shipped()
    if isinstance(model, str | os.PathLike):
        return ByteModel(load_bytelm(model))
    return ByteModel(model) if isinstance(model, Bytelm) else model


def _tell(progress: Progress | None, before: int, total: int, done: int) -> None:
    if progress is not None:
        progress(before + done, total)


# ---- the command -----------------------------------------------------------------------------------------------------


def _bar(label: str) -> Progress:
    def update(done: int, total: int) -> None:
        filled = 30 * done // max(total, 1)
        end = "\n" if done == total else ""
        print(f"\r{label} [{'#' * filled}{'.' * (30 - filled)}] {done}/{total}", end=end, file=sys.stderr, flush=True)

    return update


def _output(command: str, source: str) -> str:
    if source == "-":
        return "-"
    if command == "compress":
        return source + SUFFIX
    if source.endswith(SUFFIX):
        return source[: -len(SUFFIX)]
    raise ValueError(f"lmzip: FILE is {source!r} and must end in {SUFFIX} where no -o says what to write")


def main(argv: list[str] | None = None) -> int:
    """The command line; 0 if all went well, 1 if not, with one sentence on standard error."""
    parser = argparse.ArgumentParser(prog="lmzip", description="Lossless compression with a language model.")
    parser.add_argument("command", choices=("compress", "decompress"))
    parser.add_argument("file", metavar="FILE", help="- for standard input")
    parser.add_argument(
        "-o", "--output", metavar="OUT", help=f"- for standard output (default: FILE{SUFFIX}, or without)"
    )
    parser.add_argument(
        "--model", default="bytelm", help="bytelm, which comes with pycore, or the path of a checkpoint"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(argv)
    try:
        target = options.output or _output(options.command, options.file)
        data = sys.stdin.buffer.read() if options.file == "-" else Path(options.file).read_bytes()
        progress = None if options.quiet or not sys.stderr.isatty() else _bar(options.command)
        model = None if options.model == "bytelm" else options.model
        run = compress if options.command == "compress" else decompress
        result = run(data, model, progress=progress)
        if target == "-":
            sys.stdout.buffer.write(result)
            sys.stdout.buffer.flush()
        else:
            part = Path(target + ".part")
            part.write_bytes(result)
            os.replace(part, target)
    except (OSError, ValueError) as error:
        print(f"lmzip: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

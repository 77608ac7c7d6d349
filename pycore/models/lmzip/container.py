# SPDX-License-Identifier: Apache-2.0
"""lmzip's files: a header, how long the segments are, and their payloads; docs/formats.md has the format."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pycore import BitstreamError
from pycore._checks import check_bytes, check_int
from pycore.models.bytelm import Bytelm
from pycore.models.language import ByteModel, LanguageModel, load_bytelm, shipped
from pycore.models.lmzip.segments import decode, encode, framed, trim
from pycore.models.tokens import load_tokens

__all__ = ["HEADER", "Model", "Progress", "compress", "decompress"]

MAGIC, VERSION = b"PCLZ", 1
STORED, CODED, MIXED = 0, 1, 2  # as it is; all segments coded; each one coded or as it is
METHODS = (STORED, CODED, MIXED)
HEADER = struct.Struct("<4sBBIII")  # magic, version, method, CRC of the rest, CRC of the text, fingerprint
MOST_SEGMENT = 1 << 20
Progress = Callable[[int, int], None]  # tokens done, tokens in all
Model = LanguageModel | Bytelm | str | os.PathLike[str]


def compress(
    data: bytes,
    model: Model | None = None,
    *,
    segment: int | None = None,
    batch: int | None = None,
    chunk: int = 256,
    progress: Progress | None = None,
) -> bytes:
    """The bytes of `data` in fewer bytes, or stored as they are where the model knows nothing of them.

    Args:
        data: any bytes.
        model: a :class:`LanguageModel`, a :class:`Bytelm`, the path of a checkpoint of one, or the folder of a Llama
            (:func:`pycore.models.tokens.load_tokens`); None for the byte model that comes with pycore.
        segment: tokens that are read one after another, 1 to 2^20 and to what the model reads. More are denser, fewer
            decompress faster: the segments of a batch are read side by side. None: as the model advises.
        batch: segments that are read at a time (None: as the model advises), and
        chunk: the most tokens of each; the result does not depend on these two.
        progress: called with the tokens that are done and all there are.
    """
    check_bytes("compress", "data", data)
    for name, number in (("segment", segment), ("batch", batch), ("chunk", chunk)):
        if number is not None:
            check_int("compress", name, number, 1)
    if segment is not None and segment > MOST_SEGMENT:
        raise ValueError(f"compress: segment is {segment} and must be at most {MOST_SEGMENT}")
    data = bytes(data)
    language = _language(model)
    if segment is not None and segment > language.longest:
        raise ValueError(f"compress: segment is {segment} and must be at most {language.longest}, which model reads")
    tokens = language.tokens(data)
    segment, batch = segment or language.segment(len(tokens)), batch or language.batch
    segments = [tokens[at : at + segment] for at in range(0, len(tokens), segment)]
    payloads: list[bytes] = []
    for at in range(0, len(segments), batch):
        tell = partial(_tell, progress, at * segment, len(tokens))
        payloads += encode(language, segments[at : at + batch], chunk, tell)
        trim()
    method, fingerprint = CODED, language.fingerprint
    sizes = [len(payload) for payload in payloads]
    for at, own in enumerate(segments):
        # A token is a byte at least, so that fewer bytes than tokens are never dearer than the text.
        if sizes[at] >= len(own) and len(text := language.text(own)) < sizes[at]:
            method, payloads[at] = MIXED, text
    if method == MIXED:
        sizes = [len(payload) << 1 | (len(payload) < size) for payload, size in zip(payloads, sizes, strict=True)]
    body = _number(len(tokens)) + _number(segment) + b"".join(map(_number, sizes)) + b"".join(payloads)
    if len(body) > len(data):
        method, fingerprint, body = STORED, 0, data
    crc = zlib.crc32(data)
    check = zlib.crc32(body, zlib.crc32(HEADER.pack(MAGIC, VERSION, method, 0, crc, fingerprint)))
    return HEADER.pack(MAGIC, VERSION, method, check, crc, fingerprint) + body


def decompress(
    data: bytes,
    model: Model | None = None,
    *,
    batch: int | None = None,
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
    if batch is not None:
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
    if method not in METHODS:
        raise BitstreamError(f"decompress: data has method {method} and must have one of {METHODS}")
    if method != STORED:
        body = _decoded(body, _language(model), fingerprint, method == MIXED, batch, progress)
    if zlib.crc32(body) != text:
        raise BitstreamError("decompress: data does not decode to what was compressed")
    return body


def _decoded(
    body: bytes, language: LanguageModel, fingerprint: int, mixed: bool, batch: int | None, progress: Progress | None
) -> bytes:
    if fingerprint != language.fingerprint:
        raise BitstreamError(
            f"decompress: data was compressed with model {fingerprint:08x} and this one is {language.fingerprint:08x}; "
            "weights, window and the bits that the machine computes must be the same"
        )
    total, at = _read_number(body, 0)
    segment, at = _read_number(body, at)
    if not 1 <= segment <= MOST_SEGMENT or -(-total // segment) > len(body) or segment > language.longest:
        raise BitstreamError(f"decompress: data claims {total} tokens in segments of {segment}, which cannot be")
    counts = [min(segment, total - begin) for begin in range(0, total, segment)]
    sizes, raw = [], []
    for _ in counts:
        size, at = _read_number(body, at)
        raw.append(mixed and size & 1 == 1)
        sizes.append(size >> 1 if mixed else size)
    if at + sum(sizes) != len(body):
        raise BitstreamError("decompress: data has another length than its segments")
    payloads = []
    for size in sizes:
        payloads.append(body[at : at + size])
        at += size
    coded = [n for n, own in enumerate(raw) if not own]
    batch, todo, done = batch or language.batch, sum(counts[n] for n in coded), 0
    for first in range(0, len(coded), batch):
        group = coded[first : first + batch]
        streams = [framed(payloads[n], counts[n], fingerprint) for n in group]
        rows = decode(language, streams, [counts[n] for n in group], partial(_tell, progress, done, todo))
        for n, row in zip(group, rows, strict=True):
            payloads[n] = language.text(row)
            done += len(row)
        trim()
    return b"".join(payloads)


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


def _language(model: Model | None) -> LanguageModel:
    if model is None:
        return shipped()
    if isinstance(model, str | os.PathLike):
        return load_tokens(model) if Path(model).is_dir() else ByteModel(load_bytelm(model))
    return ByteModel(model) if isinstance(model, Bytelm) else model


def _tell(progress: Progress | None, before: int, total: int, done: int) -> None:
    if progress is not None:
        progress(before + done, total)

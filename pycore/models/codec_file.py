# SPDX-License-Identifier: Apache-2.0
"""Files of a `Codec`: its codes behind its code model and the coder, and the codec itself.

The frames are cut into segments, which are read side by side, each from its own start: encoding takes many frames of
each in one pass, decoding a code of every segment at a time, from caches. Both see the same distributions, to the last
bit, so the codes that come back are those that went in. All segments are one stream of the coder: frame by frame, in a
frame code by code, and of each the segments in turn. The caches are Λ's, of constant size; or, with a `ladder`, a
staircase, which keeps them in a third of the bytes and reads the same in encoding and decoding.

docs/formats.md has the format. What is damaged is a BitstreamError. `pycore.models.codec_command` is the command line.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pycore import ArithmeticDecoder, ArithmeticEncoder, BitstreamError, ops
from pycore._checks import check_bytes, check_int
from pycore.cache import LambdaKVCache
from pycore.cache.staircase_cache import Staircase
from pycore.models import _checkpoint
from pycore.models.codec import Codec, CodecConfig
from pycore.nn.staircase import StaircaseLayer

__all__ = ["CodecFile", "fingerprint", "fixed_bytes", "load_codec", "pack", "save_codec", "unpack"]

MAGIC, VERSION = b"PCCF", 1
HEADER = struct.Struct("<4sBBBBHIIQ")  # magic, version, codes of a frame, segments, widths, step, CRC, frames, samples
CRC_AT = 10
MOST_SEGMENTS, MOST_STEPS = 255, 32
CHUNK_BYTES = 32 << 20  # of the distributions that encoding holds at a time


@dataclass(frozen=True)
class CodecFile:
    """What :func:`unpack` found.

    Attributes:
        codes: int64 [frames, n].
        samples: of the waveform that they came from; 0 if from none.
        segments: how many the frames were cut into.
        ladder, step: of the staircase that the code model read; no widths for Λ's caches.
    """

    codes: Tensor
    samples: int
    segments: int
    ladder: tuple[int, ...]
    step: int


@torch.no_grad()
def fingerprint(codec: Codec) -> int:
    """63 bits that two codecs, or machines that compute other bits, do not share."""
    config = codec.config
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    weights = {f"code_model.{name}": x for name, x in codec.code_model.state_dict().items()}
    books = codec.quantizer.codebooks
    weights |= {f"codebook.{i}": book for i, book in enumerate(books)}
    for name, x in sorted(weights.items()):
        digest.update(name.encode() + x.detach().cpu().contiguous().numpy().tobytes())
    # The same weights on a machine that computes other bits are another codec.
    shape = (1, 70, config.quantizers)
    probe = torch.arange(math.prod(shape)).reshape(shape) * 7919 % config.codes
    digest.update(codec.code_model(probe).numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "little") >> 1


def fixed_bytes(codec: Codec, codes: Tensor) -> int:
    """Bytes of codes that are each written in the same number of bits, log2 of the codebook's size."""
    return math.ceil(codes.numel() * math.log2(codec.config.codes) / 8)


@torch.inference_mode()
def pack(
    codec: Codec,
    codes: Tensor,
    *,
    samples: int = 0,
    segments: int | None = None,
    ladder: Sequence[int] = (),
    step: int = 128,
) -> bytes:
    """A file of codes.

    Args:
        codec: what made them.
        codes: int64 [frames, n], the first n of Q codes of every frame.
        samples: of the waveform that they are of, at most (frames - 1) hop; 0 for other frames.
        segments: 1 to 255. More decode faster, fewer are denser, since each starts without a past. By default one for
            every 500 frames, up to 64.
        ladder, step: bits of a `Staircase` for the code model's caches; no widths for Λ's own, in full.

    Raises:
        ValueError, TypeError, IndexError: an argument that does not fit.
    """
    codec._check_codes(codes)
    frames, stages = codes.shape
    check_int("codec_file.pack", "samples", samples, 0, max(0, frames - 1) * codec.config.hop)
    if stages > 255 or frames >= 1 << 32:
        raise ValueError(f"codec_file.pack: codes has shape {list(codes.shape)} and must be below [2^32, 256]")
    wanted = max(1, min(64, frames // 500)) if segments is None else segments
    check_int("codec_file.pack", "segments", wanted, 1, MOST_SEGMENTS)
    caches = _caches(codec, tuple(ladder), step)
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < codec.config.codes:
        raise IndexError(f"codec_file.pack: codes has entries that are not 0 to {codec.config.codes - 1}, and must not")
    coder = ArithmeticEncoder(model_id=fingerprint(codec))
    count = _encode(codec, codes, wanted, caches, coder) if frames else 1
    header = [MAGIC, VERSION, stages, count, len(ladder), step if ladder else 0, 0, frames, samples]
    body = bytes(ladder) + coder.finish()
    header[6] = zlib.crc32(body, zlib.crc32(HEADER.pack(*header)))
    return HEADER.pack(*header) + body


def unpack(codec: Codec, data: bytes) -> CodecFile:
    """The codes of a file, and what else it says.

    Raises:
        BitstreamError: data is damaged, truncated, extended, of another format, or from another codec.
    """
    op = "codec_file.unpack"
    check_bytes(op, "data", data)
    data = bytes(data)
    if len(data) < HEADER.size or data[:4] != MAGIC:
        raise BitstreamError(f"{op}: data does not begin as a codec's files do")
    _, version, stages, segments, widths, step, check, frames, samples = HEADER.unpack_from(data)
    if version != VERSION:
        raise BitstreamError(f"{op}: data has version {version} and must have {VERSION}")
    if check != zlib.crc32(data[CRC_AT + 4 :], zlib.crc32(bytes(4), zlib.crc32(data[:CRC_AT]))):
        raise BitstreamError(f"{op}: data is damaged or not whole: its CRC is another")
    ladder = tuple(data[HEADER.size : HEADER.size + widths])
    decoder = ArithmeticDecoder(data[HEADER.size + widths :], model_id=fingerprint(codec))
    length = -(-frames // max(segments, 1))
    if (
        not 1 <= stages <= codec.config.quantizers
        or len(decoder) != frames * stages
        or segments != max(1, -(-frames // max(length, 1)))
        or samples > max(0, frames - 1) * codec.config.hop
    ):
        raise BitstreamError(
            f"{op}: data claims {len(decoder)} codes, {frames} frames of {stages} in {segments} segments and {samples} "
            "samples, which cannot be"
        )
    try:
        caches = _caches(codec, ladder, step)
    except ValueError as error:
        raise BitstreamError(f"{op}: data has a ladder that none has: {error}") from error
    with torch.inference_mode():
        decoded = _decode(codec, decoder, frames, stages, segments, caches).numpy()
    decoder.finish()
    codes = torch.from_numpy(decoded.copy())  # which may be trained on
    return CodecFile(codes, samples, segments, ladder, step)


# ---- segments --------------------------------------------------------------------------------------------------------


def _caches(codec: Codec, ladder: tuple[int, ...], step: int) -> Sequence[LambdaKVCache | StaircaseLayer]:
    model = codec.code_model
    if not ladder:
        return model.caches()
    if codec.config.position in ("rope", "harmonic"):
        raise ValueError(
            f"codec_file: position is {codec.config.position!r}, whose rotations no ladder takes, and must be another"
        )
    check_int("codec_file", "step", step, 1, 65535)
    stairs = Staircase(ladder, step=step, sink_size=model.schedule.sink_size, rollback=0)
    return [StaircaseLayer(stairs, model.schedule, codec.config.window) for _ in model.blocks]


def _encode(
    codec: Codec,
    codes: Tensor,
    segments: int,
    caches: Sequence[LambdaKVCache | StaircaseLayer],
    coder: ArithmeticEncoder,
) -> int:
    """Codes the segments; how many there are, which is fewer where some would be empty."""
    frames, stages = codes.shape
    length = -(-frames // segments)
    segments = -(-frames // length)
    # -1 behind the last frame, which is not coded, and before the first.
    rows = functional.pad(codes, (0, 0, 0, segments * length - frames), value=-1).reshape(segments, length, stages)
    before = functional.pad(rows, (0, 0, 1, 0), value=-1)
    chunk = max(1, CHUNK_BYTES // (4 * segments * stages * (codec.config.codes + 1)))
    for at in range(0, length, chunk):
        now = rows[:, at : at + chunk]
        context = codec.code_model.context(before[:, at : at + now.shape[1]], caches)
        logits = torch.stack([codec.code_model.stage(q, context, now) for q in range(stages)], 2)
        in_turn, given = (x.movedim(0, 2) for x in (now, logits))  # [chunk, n, segments, …]
        coded = in_turn >= 0
        cdf = ops.quantize_cdf(logits=given[coded], precision=None)
        coder.encode(in_turn[coded].numpy(), cdf.numpy())
    return segments


def _decode(
    codec: Codec,
    decoder: ArithmeticDecoder,
    frames: int,
    stages: int,
    segments: int,
    caches: Sequence[LambdaKVCache | StaircaseLayer],
) -> Tensor:
    length = -(-frames // segments)
    last = frames - (segments - 1) * length  # frames of the last segment, which may be shorter
    before, steps = torch.full((segments, 1, stages), -1), []
    for t in range(length):
        context = codec.code_model.context(before, caches)
        before = torch.full((segments, 1, stages), -1)
        coded = segments if t < last else segments - 1
        for q in range(stages):
            logits = codec.code_model.stage(q, context, before)[:coded, 0]
            cdf = ops.quantize_cdf(logits=logits, precision=None)
            before[:coded, 0, q] = torch.from_numpy(decoder.decode(cdf.numpy()))
        steps.append(before)
    if not steps:
        return torch.empty(0, stages, dtype=torch.int64)
    return torch.cat(steps, 1).flatten(0, 1)[:frames]


# ---- a codec as a file -----------------------------------------------------------------------------------------------


def save_codec(codec: Codec, path: str | os.PathLike[str], facts: dict[str, Any] | None = None) -> None:
    """Writes the weights with the configuration and whatever `facts` say about their origin."""
    _checkpoint.save(codec.state_dict(), codec.config, path, facts)


def load_codec(path: str | os.PathLike[str]) -> Codec:
    """The codec of a file that :func:`save_codec` wrote, in evaluation mode.

    Raises:
        ValueError: the file is none of these.
        OSError: it cannot be read.
    """
    return _checkpoint.load(
        "load_codec", path, lambda config: Codec(CodecConfig(**config)), "a file of save_codec"
    ).eval()

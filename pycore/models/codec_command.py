# SPDX-License-Identifier: Apache-2.0
"""Sound as a file of codes, and back.

    python -m pycore.models.codec_command encode SOUND.wav --codec CODEC.pt [-o OUT] [--codebooks N] [--ladder 16 8 4]
    python -m pycore.models.codec_command decode FILE.pccf --codec CODEC.pt [-o OUT.wav]

CODEC.pt is what `pycore.models.codec_file.save_codec` wrote; `examples/speech_codec.py` trains one. After an error
nothing is written.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from pycore.models.codec import Codec
from pycore.models.codec_audio import read_wav, resample, write_wav
from pycore.models.codec_file import fixed_bytes, load_codec, pack, unpack

__all__ = ["main"]

SUFFIX = ".pccf"


def _encode_file(options: argparse.Namespace, codec: Codec) -> str:
    sound = resample(*read_wav(options.file), codec.config.sample_rate)
    if not len(sound):
        raise ValueError(f"{options.file} has no samples, and must have some")
    codes = codec.encode(sound, quantizers=options.codebooks)
    data = pack(codec, codes, samples=len(sound), ladder=options.ladder, step=options.step)
    target = options.output or options.file + SUFFIX
    _write(target, data)
    fixed, seconds = fixed_bytes(codec, codes), len(sound) / codec.config.sample_rate
    saved = 1 - len(data) / fixed
    return (
        f"{target}: {len(data)} bytes for {seconds:.2f} s, {len(codes)} frames of {codes.shape[1]} codes; "
        f"{abs(saved):.1%} {'below' if saved > 0 else 'above'} the {fixed} bytes of codes of a fixed length"
    )


def _decode_file(options: argparse.Namespace, codec: Codec) -> str:
    found = unpack(codec, Path(options.file).read_bytes())
    if found.samples == 0:
        raise ValueError(f"{options.file} holds frames of no waveform, and must hold sound")
    target = options.output or options.file.removesuffix(SUFFIX).removesuffix(".wav") + ".decoded.wav"
    part = Path(target + ".part")
    write_wav(part, codec.decode(found.codes, length=found.samples), codec.config.sample_rate)
    os.replace(part, target)
    return f"{target}: {found.samples / codec.config.sample_rate:.2f} s of {found.codes.shape[1]} codes a frame"


def _write(target: str, data: bytes) -> None:
    part = Path(target + ".part")
    part.write_bytes(data)
    os.replace(part, target)


def main(argv: list[str] | None = None) -> int:
    """The command line; 0 if all went well, 1 if not, with one sentence on standard error."""
    parser = argparse.ArgumentParser(prog="codec", description="Sound as a file of codes, and back.")
    parser.add_argument("command", choices=("encode", "decode"))
    parser.add_argument("file", metavar="FILE", help="a WAV file of 16 bits, or what encode wrote")
    parser.add_argument("--codec", required=True, help="a file of save_codec, as examples/speech_codec.py writes one")
    parser.add_argument("-o", "--output", metavar="OUT", help=f"default: FILE{SUFFIX}, or FILE.decoded.wav")
    parser.add_argument("--codebooks", type=int, help="codes of a frame (default: all)")
    parser.add_argument("--ladder", type=int, nargs="*", default=[], help="bits of a staircase for the caches")
    parser.add_argument("--step", type=int, default=128, help="frames of a step of it (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        codec = load_codec(options.codec)
        print((_encode_file if options.command == "encode" else _decode_file)(options, codec))
    except (OSError, ValueError) as error:
        print(f"codec: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

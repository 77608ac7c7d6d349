# SPDX-License-Identifier: Apache-2.0
"""The command line of lmzip."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from pycore.cache.staircase_cache import Staircase
from pycore.models.language import shipped
from pycore.models.language_ngram import NgramByteModel
from pycore.models.lmzip.container import Model, Progress, compress, decompress
from pycore.models.tokens import load_tokens

__all__ = ["main"]

SUFFIX = ".pclz"
NGRAMS = ("ngram", "bytelm+ngram")
# Where examples/smollm2.py puts the model of that name.
SMOLLM2 = Path(__file__).resolve().parents[3] / "build" / "smollm2"


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


def _model(name: str, staircase: bool) -> Model | None:
    """What --model names; None for the byte model that comes with pycore."""
    if name in NGRAMS and not staircase:
        return NgramByteModel(shipped() if name == "bytelm+ngram" else None)
    path = SMOLLM2 if name == "smollm2" else Path(name)
    if name == "smollm2" and not (path / "model.safetensors").is_file():
        raise ValueError(
            f"lmzip: the model is not at {path}; python examples/smollm2.py fetches it, and --model takes a folder"
        )
    if path.is_dir():
        return load_tokens(path, staircase=Staircase() if staircase else None)
    if staircase:
        raise ValueError(f"lmzip: --staircase is given and --model is {name!r}, which must be a Llama for it")
    return None if name == "bytelm" else name


def main(argv: list[str] | None = None) -> int:
    """The command line; 0 if all went well, 1 if not, with one sentence on standard error."""
    parser = argparse.ArgumentParser(prog="lmzip", description="Lossless compression with a language model.")
    parser.add_argument("command", choices=("compress", "decompress"))
    parser.add_argument("file", metavar="FILE", help="- for standard input")
    parser.add_argument(
        "-o", "--output", metavar="OUT", help=f"- for standard output (default: FILE{SUFFIX}, or without)"
    )
    parser.add_argument(
        "--model", default="bytelm", metavar="NAME",
        help="bytelm, which comes with pycore (default); bytelm+ngram, mixed with counts of the text itself: denser, "
        "slower; ngram, the counts alone; smollm2, which examples/smollm2.py fetches; the path of a checkpoint of a "
        "Bytelm, or the folder of a Llama in the form of transformers",
    )  # fmt: skip
    parser.add_argument("--segment", type=int, help="tokens that are read one after another; more are denser, slower")
    parser.add_argument(
        "--staircase", action="store_true", help="a Llama's cache in fewer bits; say so again to decompress"
    )
    parser.add_argument("--threads", type=int, help="of the processor (default: torch's)")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(argv)
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads is {options.threads} and must be at least 1")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        target = options.output or _output(options.command, options.file)
        data = sys.stdin.buffer.read() if options.file == "-" else Path(options.file).read_bytes()
        progress = None if options.quiet or not sys.stderr.isatty() else _bar(options.command)
        model = _model(options.model, options.staircase)
        if options.command == "compress":
            result = compress(data, model, segment=options.segment, progress=progress)
        else:
            result = decompress(data, model, progress=progress)
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

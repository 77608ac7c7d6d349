# SPDX-License-Identifier: Apache-2.0
"""lmzip beside gzip, bz2, xz, zstd and brotli: ratio and speed, on whole files and on records of 2 KB.

The files are those of the standard library that the shipped model was not trained on (the first 16 KB of each), and
whatever --text names, or four texts of the Canterbury corpus, by which compressors are told apart (they come with the
source package of brotli: pip download --no-deps --no-binary :all: brotli, and then its folder tests/testdata).

    python examples/compression.py [--files 24] [--text FILE ...]     # table and JSON under examples/out/
    python examples/compression.py --model smollm2 [--text FILE ...]  # with SmolLM2-135M, on one text of 100 KB
    python examples/compression.py [--model smollm2] --canterbury FOLDER --most 0     # four texts, whole
    python examples/compression.py --quick                            # one file, to see that it runs

What takes long is written row by row, and taken up again where it was left if the commit is the same.
"""

from __future__ import annotations

import argparse
import bz2
import json
import lzma
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import smollm2
from common import Parser, Progress, UserError, facts, make_folder, run_main, write

from pycore import Staircase
from pycore.models.language import shipped
from pycore.models.language_ngram import NgramByteModel
from pycore.models.lmzip import compress, decompress
from pycore.models.tokens import load_tokens

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.train_bytelm import corpus

NAME = "compression"
RECORD, MOST, WHOLE = 2048, 16384, 100_000
QUICK = 512  # of both, with --quick
CANTERBURY = ("alice29.txt", "asyoulik.txt", "lcet10.txt", "plrabn12.txt")
SPEEDS = {"compress_kb_per_s": "packs KB/s", "decompress_kb_per_s": "unpacks KB/s"}
OWN = f"{WHOLE} bytes of held-out sources"
Coder = tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]


def lmzip(model: Any, segment: int | None) -> Coder:
    """With a model."""
    return lambda x: compress(x, model, segment=segment), lambda x: decompress(x, model)


def coders(model: Any, segment: int | None) -> dict[str, Coder]:
    """Every compressor that is installed, at its densest."""
    found: dict[str, Coder] = {"lmzip": lmzip(model, segment)}
    if model is None:
        found["lmzip, bytelm+ngram"] = lmzip(NgramByteModel(shipped()), segment)
        found["lmzip, ngram"] = lmzip(NgramByteModel(), segment)
    found |= {
        "gzip -9": (lambda x: zlib.compress(x, 9, 31), lambda x: zlib.decompress(x, 31)),
        "bz2 -9": (bz2.compress, bz2.decompress),
        "xz -9e": (lambda x: lzma.compress(x, preset=9 | lzma.PRESET_EXTREME), lzma.decompress),
    }
    try:
        import zstandard

        zstd = zstandard.ZstdCompressor(level=19), zstandard.ZstdDecompressor()
        found["zstd -19"] = (zstd[0].compress, zstd[1].decompress)
    except ImportError:
        print("zstandard is not installed and left out")
    try:
        import brotli

        found["brotli -11"] = (brotli.compress, brotli.decompress)
    except ImportError:
        print("brotli is not installed and left out")
    return found


def measure(name: str, parts: list[bytes], coder: Coder, progress: Progress, done: int, sizes: bool) -> dict[str, Any]:
    """Sizes and, unless sizes alone are wanted, times over all parts; what comes back is compared."""
    size = seconds = back = 0.0
    for n, part in enumerate(parts, 1):
        started = time.perf_counter()
        packed = coder[0](part)
        middle = time.perf_counter()
        again = coder[1](packed)
        back += time.perf_counter() - middle
        seconds += middle - started
        if again != part:
            raise UserError(f"{name} gave back something else")
        size += len(packed)
        progress.update(done + n, name)
    total = sum(map(len, parts))
    row = {
        "name": name, "bytes": total, "packed": int(size), "ratio": total / size, "bits_per_byte": 8 * size / total,
    }  # fmt: skip
    return row if sizes else row | {key: total / 1000 / t for key, t in zip(SPEEDS, (seconds, back), strict=True)}


def rows_before(path: Path, result: dict[str, Any]) -> dict[tuple[str, str, int], dict[str, Any]]:
    """What a run that did not come to its end has measured, if it was of the same commit, machine and threads."""
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        if any(old[key] != result[key] for key in ("commit", "machine", "threads", "torch", "python", "quick")):
            return {}
        return {(title, row["name"], row["crc"]): row for title, rows in old["parts"].items() for row in rows}
    except (OSError, ValueError, KeyError):
        return {}


def table(title: str, rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    speeds = [(key, head) for key, head in SPEEDS.items() if key in rows[0]]
    lines = [f"{title:<34}{'ratio':>8}{'bits/byte':>11}" + "".join(f"{head:>14}" for _, head in speeds)]
    for row in rows:
        line = f"{row['name']:<34}{row['ratio']:>8.2f}{row['bits_per_byte']:>11.3f}"
        lines.append(line + "".join(f"{row[key]:>14.1f}" for key, _ in speeds))
    return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    """Measures everything; returns the exit status: 1 if lmzip is below 1.3 times gzip's ratio on records.

    With SmolLM2: below twice xz's on the text of its own.
    """
    make_folder(options.out)
    record, most = (QUICK, QUICK) if options.quick else (RECORD, MOST)
    held_out = [data[:most] for _, data in corpus()[1] if len(data) >= RECORD]
    step = max(1, len(held_out) // options.files)
    files = held_out[::step][: options.files]
    records, model = [data[:record] for data in files], None
    of_records = f"{len(records)} records of {record} bytes"
    parts = {f"{len(files)} held-out files": files, of_records: records}
    whole_texts = [options.canterbury / name for name in CANTERBURY] if options.canterbury else []
    if options.canterbury:
        parts = {}
    if options.model == "smollm2":
        if not smollm2.present():
            raise UserError(smollm2.missing())
        model = load_tokens(smollm2.FOLDER, staircase=Staircase() if options.staircase else None)
        whole = b"".join(data for _, data in corpus()[1])
        parts = {} if options.text or options.canterbury else {OWN: [whole[:WHOLE]]}
        if options.quick:
            parts = {"2048 bytes of sources": [whole[:2048]]}
    for path in [*options.text, *whole_texts]:
        try:
            parts[path.name] = [path.read_bytes()[: options.most or None]]
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
    found = coders(model, 64 if model and options.quick else options.segment)
    progress = Progress(NAME, len(found) * sum(map(len, parts.values())))
    result: dict[str, Any] = {"name": NAME, "quick": options.quick, **facts(), "parts": {}}
    stem = NAME if model is None else f"{NAME}_{options.model}"
    stem += "_canterbury" if options.canterbury else ""
    stem += "_staircase" if options.staircase else ""
    stem += f"_{options.segment}" if options.segment else ""
    stem += "_sizes" if options.sizes else ""
    stem += "_quick" if options.quick else ""
    before = rows_before(options.out / f"{stem}.json", result)
    done = 0
    for title, texts in parts.items():
        rows = result["parts"].setdefault(title, [])
        for name, coder in found.items():
            crc = zlib.crc32(b"".join(texts))
            row = before.get((title, name, crc)) or measure(name, texts, coder, progress, done, options.sizes)
            rows.append({**row, "crc": crc})
            done += len(texts)
            write(result, options.out / stem, None, quiet=True)
        print(table(title, rows))
    print(f"written: {options.out / stem}.json")
    if options.canterbury:
        return 0
    if model is not None:
        enough = True
        for title, rows in result["parts"].items():
            ratio = {row["name"]: row["ratio"] for row in rows}
            factor = ratio["lmzip"] / ratio["xz -9e"]
            enough = enough and (factor >= 2.0 or title != OWN)
            print(f"{title}: {factor:.2f} times xz's ratio")
        return 0 if enough else 1
    ratio = {row["name"]: row["ratio"] for row in result["parts"][of_records]}
    factor = ratio["lmzip"] / ratio["gzip -9"]
    print(f"on records lmzip has {factor:.2f} times gzip's ratio")
    return 0 if options.quick or factor >= 1.3 else 1


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "out")
    parser.add_argument("--files", type=int, default=24, help="held-out files (default: %(default)s)")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="other texts, each by itself")
    parser.add_argument("--canterbury", type=Path, metavar="FOLDER", help=f"its {', '.join(CANTERBURY)}, nothing else")
    parser.add_argument("--most", type=int, default=60000, help="bytes of each, 0 for all of it (default: %(default)s)")
    parser.add_argument("--model", choices=("bytelm", "smollm2"), default="bytelm", help="of lmzip (default: bytelm)")
    parser.add_argument("--staircase", action="store_true", help="SmolLM2's cache in fewer bits")
    parser.add_argument("--segment", type=int, help="tokens that lmzip reads one after another (default: its own)")
    parser.add_argument("--sizes", action="store_true", help="no speeds: for a machine that has other work to do")
    parser.add_argument("--quick", action="store_true", help="one file")
    options = parser.parse_args(argv)
    for name, least in (("files", 1), ("most", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name} is {getattr(options, name)} and must be at least {least}")
    if options.staircase and options.model != "smollm2":
        parser.error(f"--staircase is given and --model is {options.model}, which must be smollm2 for it")
    if options.segment is not None and options.segment < 1:
        parser.error(f"--segment is {options.segment} and must be at least 1")
    options.files = 1 if options.quick else options.files
    return options


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_main(NAME, lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())

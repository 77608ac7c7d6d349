# SPDX-License-Identifier: Apache-2.0
"""All of pycore's families in a row: a WAV file or a text becomes a small file, and comes back.

    sound    linear: frames  ->  vq: codes  ->  attention on a staircase: what comes next  ->  coder: a file  ->  back
    text     vq: a byte model whose heads speak in codes  ->  attention on a staircase  ->  coder: a file  ->  back

For each family a line says what it contributed. The codes of the sound that come back, and the bytes of the text, are
compared with what went in, and the files of one thread with those of two.

    python examples/compose.py              # recordings, speech or vowels, and a source file; JSON under examples/out/
    python examples/compose.py FILE ...     # WAV files of 16 bits, and texts of any kind
    python examples/compose.py --quick      # the same path in seconds, figures without meaning

Real recordings come from `python examples/recordings.py`; else espeak-ng reads, where it is installed, and else there
are synthetic vowels. The codec is trained on other sound of the kind, in less than a minute, and kept under --out.
"""

from __future__ import annotations

import argparse
import math
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import recordings
import torch
from common import Parser, Progress, UserError, facts, make_folder, run_main, write
from speech_codec import learn_codebooks, sound
from torch import Tensor

from pycore import Staircase
from pycore.models.bytelm import Bytelm, tokens_from_bytes
from pycore.models.codec import Codec, CodecConfig
from pycore.models.codec_audio import has_espeak, write_wav
from pycore.models.codec_file import fixed_bytes, load_codec, pack, save_codec, unpack
from pycore.models.language import ByteModel, shipped
from pycore.models.language_staircase import StaircaseByteModel
from pycore.models.lmzip import compress, decompress
from pycore.models.memory import learn_codebooks as learn_head_codes
from pycore.models.memory import with_codebooks
from pycore.models.training import fit
from pycore.nn.staircase import StaircaseLayer
from pycore.schedules import Lambda

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.train_bytelm import held_out

NAME = "compose"
LADDER, STEP = (16, 8, 4), 64
TESTED = ("Front_Center", "Rear_Left", "Side_Right")  # of the recordings; every word is in another one too
T = TypeVar("T")


class Lines:
    """A line for each family: what it did, what it changed, and how long it took."""

    def __init__(self, title: str) -> None:
        self.title, self.rows = title, []  # type: ignore[var-annotated]
        print(title)

    def add(self, family: str, seconds: float, text: str, **figures: float) -> None:
        """Prints and keeps one; its text names the figures in braces."""
        said = text.format(**figures)
        print(f"  {family:<18}{said}  [{seconds:.1f} s]", flush=True)
        self.rows.append({"family": family, "seconds": seconds, "text": said, **figures})


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """What it returns, and the seconds it took."""
    started = time.perf_counter()
    result = run()
    return result, time.perf_counter() - started


def on_threads(run: Callable[[], bytes]) -> tuple[bytes, float, bool]:
    """What it returns, its seconds, and whether another number of threads gives the same bytes."""
    before = torch.get_num_threads()
    data, seconds = timed(run)
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        return data, seconds, run() == data
    finally:
        torch.set_num_threads(before)


# ---- sound -----------------------------------------------------------------------------------------------------------


def kind_of_sound(quick: bool) -> str:
    """What there is to learn from and to try on."""
    if quick:
        return "synthetic vowels"
    return "recordings" if recordings.recordings() else "espeak-ng" if has_espeak() else "synthetic vowels"


def default_sound(kind: str, out: Path, rate: int) -> Path:
    """A WAV file of that kind, which no codec here learns from."""
    path = out / f"{NAME}_input.wav"
    if kind == "recordings":
        parts = [recordings.read(each, rate) for each in recordings.recordings() if each.stem in TESTED]
        write_wav(path, torch.cat(parts), rate)
    elif kind == "espeak-ng":
        write_wav(path, sound(5, -1, True), rate)
    else:
        write_wav(path, sound(0.5, 10**6, False), rate)
    return path


def trained(options: argparse.Namespace, kind: str) -> tuple[Codec, str, float]:
    """The codec, what is said of its training, and the seconds it took; a kept one if it was trained so."""
    config = CodecConfig(position="alibi", **({"codes": 32, "dim": 32, "layers": 1} if options.quick else {}))
    how = {"kind": kind, "seconds": options.seconds, "steps": options.steps}
    path = options.out / f"{NAME}_codec{'_quick' if options.quick else ''}.pt"
    if path.exists() and torch.load(path, weights_only=True).get("facts") == how:
        return load_codec(path), f"kept from before: {path}", 0.0
    started = time.perf_counter()
    torch.manual_seed(0)
    codec = Codec(config)
    learn = [sound(options.seconds, 0, kind == "espeak-ng")]
    if kind == "recordings":
        spoken = [recordings.read(each, config.sample_rate) for each in recordings.recordings()
                  if each.stem not in TESTED]  # fmt: skip
        learn += 4 * spoken
    frames = codec.frames(torch.cat(learn))
    learn_codebooks(codec, frames, options.steps, 0)
    codes, length = codec.quantizer.encode(frames[None])[0], min(125, len(frames))
    generator, progress = torch.Generator().manual_seed(0), Progress("code model", options.steps)

    def loss(step: int) -> Tensor:
        starts = torch.randint(len(codes) - length + 1, (8, 1), generator=generator)
        return codec.code_model.loss(codes[starts + torch.arange(length)])

    fit(codec.code_model, loss, steps=options.steps, weight_decay=0.1, report=progress.update)
    save_codec(codec, path, how)
    logits = 8 * length * config.quantizers * config.codes * 4
    said = (
        f"learned from {options.steps} steps of linear_cross_entropy, {logits:,} bytes of logits each that never exist"
    )
    return codec.eval(), said, time.perf_counter() - started


@torch.inference_mode()
def compose_sound(path: Path, codec: Codec, training: tuple[str, float], out: Path) -> dict[str, Any]:
    """A WAV file through all families; the result's `same` says whether the codes came back."""
    rate = codec.config.sample_rate
    given = recordings.read(path, rate)
    if not len(given):
        raise UserError(f"{path} has no samples, and must have some")
    lines = Lines(f"{path}: {len(given) / rate:.2f} s at {rate} Hz, {2 * len(given):,} bytes at 16 bits a sample")
    lines.add("pairwise", training[1], training[0])
    frames, seconds = timed(lambda: codec.frames(given))
    error = float((codec.waveform(frames, len(given)) - given).abs().max())
    lines.add("linear", seconds, "{frames} frames, which give the sound back to within {error:.1e}",
              frames=len(frames), error=error)  # fmt: skip
    codes, seconds = timed(lambda: codec.encode(given))
    power, rest = float(given.square().sum()), float((codec.decode(codes, length=len(given)) - given).square().sum())
    fixed = fixed_bytes(codec, codes)
    lines.add("vq", seconds, "{codes} codes, {bytes:,} bytes at a fixed length; SNR {snr:.2f} dB",
              codes=codes.numel(), bytes=fixed, snr=10 * math.log10(max(power, 1e-12) / max(rest, 1e-12)))  # fmt: skip
    bits, seconds = timed(lambda: float(codec.code_model.loss(codes[None])) / math.log(2))
    alone = float(codec.code_model.loss(codes[:, None])) / math.log(2)
    lines.add("attention", seconds, "Λ: {bits:.3f} bits a code, and {alone:.3f} where no frame sees those before it",
              bits=bits, alone=alone)  # fmt: skip
    model = codec.code_model
    full = model.caches()
    stairs = [StaircaseLayer(Staircase(LADDER, step=STEP, rollback=0), model.schedule, model.config.window)
              for _ in model.blocks]  # fmt: skip
    model.context(codes[None], full)
    model.context(codes[None], stairs)
    plain = pack(codec, codes, samples=len(given))
    data, seconds, threads = on_threads(lambda: pack(codec, codes, samples=len(given), ladder=LADDER, step=STEP))
    lines.add("staircase", seconds, "{full:,} bytes of caches become {nbytes:,}; the file grows by {cost} bytes",
              full=sum(x.nbytes for x in full), nbytes=sum(x.nbytes for x in stairs),
              cost=len(data) - len(plain))  # fmt: skip
    target = out / f"{path.name}.pccf"
    target.write_bytes(data)
    again, seconds = timed(lambda: unpack(codec, target.read_bytes()))
    same = torch.equal(again.codes, codes)
    back = "the same codes back" if same else "OTHER codes back"
    lines.add("arithmetic_coding", seconds, "a file of {bytes:,} bytes, {saved:.1%} below the fixed length: " + back,
              bytes=len(data), saved=1 - len(data) / fixed)  # fmt: skip
    write_wav(out / f"{path.stem}.decoded.wav", codec.decode(again.codes, length=again.samples), rate)
    return {"input": path.name, "bytes": 2 * len(given), "file": len(data), "same": same, "threads": threads,
            "rows": lines.rows}  # fmt: skip


# ---- text ------------------------------------------------------------------------------------------------------------


def default_text(library: Path) -> Path:
    """The first source file of the library that has a few pages and that the shipped model was not trained on."""
    for path in sorted(library.glob("*.py")):
        if held_out(path.name) and path.stat().st_size > 8192:
            return path
    raise UserError(f"the standard library at {library} has no file that was held out")


@torch.inference_mode()
def bits_per_byte(model: Bytelm, text: bytes, schedule: Lambda) -> float:
    """What the text costs in one pass."""
    tokens = tokens_from_bytes(text)[None]
    return float(model.loss(tokens[:, :-1], tokens[:, 1:], schedule=schedule)) / math.log(2)


def compose_text(path: Path, codes: int, other: bytes, out: Path, most: int) -> dict[str, Any]:
    """A text through all families; the result's `same` says whether it came back."""
    try:
        text = path.read_bytes()[:most]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    lines = Lines(f"{path}: {len(text):,} bytes")
    plain, schedule = shipped().model, Lambda(4, 512)
    model = with_codebooks(plain, codes, k=1)
    assert isinstance(model, Bytelm)
    batches = [tokens_from_bytes(other[at : at + 1024])[None] for at in range(0, len(other) - 1023, 1024)]
    _, seconds = timed(lambda: learn_head_codes(model, batches, iterations=5))
    lines.add("pairwise", seconds, "{books} codebooks of {codes} codes by kmeans on {rows:,} bytes of other text",
              books=model.config.layers * model.config.heads, codes=codes, rows=1025 * len(batches))  # fmt: skip
    bits, seconds = timed(lambda: bits_per_byte(model, text, schedule) if text else 0.0)
    lines.add("vq", seconds, "each head says one code a byte: {bits:.3f} bits a byte, {plain:.3f} without codebooks",
              bits=bits, plain=bits_per_byte(plain, text, schedule) if text else 0.0)  # fmt: skip
    alone, seconds = timed(lambda: bits_per_byte(model, text, Lambda(0, 1)) if text else 0.0)
    lines.add("attention", seconds, "Λ: {bits:.3f} bits a byte, and {alone:.3f} where no byte sees those before it",
              bits=bits, alone=alone)  # fmt: skip
    language = StaircaseByteModel(model, Staircase(LADDER, step=STEP, rollback=0))
    exact = ByteModel(model)
    longest = max(64, -(-len(text) // 16))  # sixteen segments side by side
    read = torch.tensor([[language.bos, *text[:longest]]])
    full, stairs = exact.state(), language.state()
    exact.logits(read, full)
    language.logits(read, stairs)
    unquantized = compress(text, exact, segment=longest)
    data, seconds, threads = on_threads(lambda: compress(text, language, segment=longest))
    lines.add("staircase", seconds, "{full:,} bytes of caches become {nbytes:,}; the file grows by {cost} bytes",
              full=sum(x.nbytes for x in full), nbytes=sum(x.nbytes for x in stairs),
              cost=len(data) - len(unquantized))  # fmt: skip
    lines.add("linear", 0.0, "products and norms in one order: the file of another number of threads is "
              + ("the same" if threads else "ANOTHER"))  # fmt: skip
    target = out / f"{path.name}.pclz"
    target.write_bytes(data)
    again, seconds = timed(lambda: decompress(target.read_bytes(), language))
    back = "the same bytes back" if again == text else "OTHER bytes back"
    lines.add("arithmetic_coding", seconds, "a file of {bytes:,} bytes, {share:.1%} of the text: " + back,
              bytes=len(data), share=len(data) / max(len(text), 1))  # fmt: skip
    return {"input": path.name, "bytes": len(text), "file": len(data), "same": again == text, "threads": threads,
            "rows": lines.rows}  # fmt: skip


# ---- the command -----------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """Everything that is asked for; returns the exit status."""
    make_folder(options.out)
    kind, library = kind_of_sound(options.quick), Path(sysconfig.get_path("stdlib"))
    given = options.file or [default_sound(kind, options.out, 16000), default_text(library)]
    parts, started = [], time.perf_counter()
    if any(path.suffix.lower() == ".wav" for path in given):
        print(f"sound to learn from: {kind}")
        codec, *training = trained(options, kind)
    other = (library / "argparse.py").read_bytes()[: 2048 if options.quick else 20480]
    for path in given:
        if path.suffix.lower() == ".wav":
            parts.append(compose_sound(path, codec, (training[0], training[1]), options.out))
        else:
            parts.append(compose_text(path, 64 if options.quick else 256, other, options.out, options.most))
    seconds = time.perf_counter() - started
    holds = all(part["same"] and part["threads"] for part in parts)
    print(f"all in {seconds:.0f} s; what came back is {'the same' if holds else 'NOT THE SAME'}, on any threads")
    result = {"name": NAME, "quick": options.quick, **facts(), "sound": kind, "all_seconds": seconds, "parts": parts}
    write(result, options.out / (f"{NAME}_quick" if options.quick else NAME), None)
    return 0 if holds else 1


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="*", help="WAV files and texts (default: one of each)")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "out")
    parser.add_argument("--seconds", type=int, help="of sound to learn from, but for recordings (default: 60)")
    parser.add_argument("--steps", type=int, help="training steps of codebooks and of code model (default: 120)")
    parser.add_argument("--most", type=int, help="bytes of a text that are read (default: 8192)")
    parser.add_argument("--quick", action="store_true", help="a few steps: only to see that it runs")
    options = parser.parse_args(argv)
    for name, quick, default in (("seconds", 10, 60), ("steps", 3, 120), ("most", 300, 8192)):
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else default)
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)} and must be at least 1")
    return options


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_main(NAME, lambda: run(arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())

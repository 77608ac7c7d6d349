# SPDX-License-Identifier: Apache-2.0
"""Files of a codec: the codes come back however they were cut up, what is damaged is reported, and the command."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import pycore
from pycore import BitstreamError
from pycore.models import codec_command
from pycore.models.codec import Codec, CodecConfig
from pycore.models.codec_audio import read_wav, synthetic_vowels, write_wav
from pycore.models.codec_file import HEADER, fingerprint, fixed_bytes, load_codec, pack, save_codec, unpack

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "codec.json"
SMALL = CodecConfig(hop=24, quantizers=4, codes=30, layers=2, dim=32, heads=2, window=20, position="alibi")


def scrambled(shape: tuple[int, ...], most: int, salt: int = 0) -> Tensor:
    """Integers 0 to most - 1 that look drawn, the same on every machine and with every torch."""
    x = torch.arange(math.prod(shape)) + 1 + 1000003 * salt
    for factor in (2654435761, 2246822519):
        x = (x * factor) % (1 << 32)
        x = x ^ (x >> 15)
    return (x % most).reshape(shape)


def spread(module: nn.Module) -> None:
    """Weights of a few bits, which are the same on every machine; large enough that shares are far from even."""
    with torch.no_grad():
        for salt, weight in enumerate(module.parameters()):
            weight.copy_((scrambled(tuple(weight.shape), 255, salt) - 127) / 256)
        for head in module.heads:  # type: ignore[union-attr]
            head.weight.mul_(4)


def made() -> Codec:
    torch.manual_seed(0)
    codec = Codec(SMALL).eval()
    spread(codec.code_model)
    for stage in codec.quantizer.layers:
        stage._codebook.embed.zero_()
        stage._codebook.initted.fill_(True)
    return codec


@pytest.fixture(scope="module")
def codec() -> Codec:
    return made()


@pytest.fixture(scope="module")
def learned() -> Codec:
    """A codec whose codes are of some sound."""
    torch.manual_seed(0)
    codec = Codec(SMALL)
    for seed in range(3):
        codec(synthetic_vowels(1.0, seed=seed)[None])
    return codec.eval()


CASES: list[dict[str, Any]] = [
    {"frames": 0, "n": 4},
    {"frames": 1, "n": 4},
    {"frames": 7, "n": 1, "segments": 3},
    {"frames": 61, "n": 4, "segments": 4, "samples": 60 * 24 - 5},
    {"frames": 61, "n": 3, "segments": 61},
    {"frames": 301, "n": 2, "segments": 2, "ladder": (16, 8, 4), "step": 64},
    {"frames": 301, "n": 2, "segments": 1, "ladder": (16, 2), "step": 64},
]


def written(codec: Codec, case: dict[str, Any]) -> tuple[Tensor, bytes]:
    case = dict(case)
    codes = scrambled((case.pop("frames"), case.pop("n")), 30)
    return codes, pack(codec, codes, **case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(f"{k}={v}" for k, v in case.items()))
@pytest.mark.usefixtures("isa", "threads")
def test_round_trips(codec: Codec, case: dict[str, Any]) -> None:
    torch.set_num_threads(2)
    codes, data = written(codec, case)
    torch.set_num_threads(1)
    assert written(codec, case)[1] == data
    found = unpack(codec, data)
    assert torch.equal(found.codes, codes) and found.codes.dtype == torch.int64
    assert (found.samples, found.ladder) == (case.get("samples", 0), case.get("ladder", ()))


def test_the_chunks_of_encoding_do_not_show(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    for case in CASES:
        whole = written(codec, case)[1]
        monkeypatch.setattr("pycore.models.codec_file.CHUNK_BYTES", 4 * 31 * 4 * 9)
        assert written(codec, case)[1] == whole
        monkeypatch.undo()


def test_size_is_the_models_entropy(learned: Codec) -> None:
    """The loss says how long the payload is; and the loss is the cross entropy of the logits."""
    codes = learned.encode(synthetic_vowels(0.75, seed=9))
    logits = learned.code_model(codes[None])
    torch.testing.assert_close(
        learned.code_model.loss(codes[None]), functional.cross_entropy(logits.flatten(0, 2), codes.flatten())
    )
    bits = learned.code_model.loss(codes[None]).item() * codes.numel() / math.log(2)
    assert bits / 8 <= len(pack(learned, codes, segments=1)) - HEADER.size - 32 <= 1.001 * bits / 8 + 4
    assert fixed_bytes(learned, codes) == math.ceil(codes.numel() * math.log2(30) / 8)


def test_sound_comes_back_as_its_codes_say(learned: Codec) -> None:
    sound = synthetic_vowels(0.5, seed=9)
    codes = learned.encode(sound)
    found = unpack(learned, pack(learned, codes, samples=len(sound), ladder=(16, 8, 4)))
    assert torch.equal(learned.decode(found.codes, length=found.samples), learned.decode(codes, length=len(sound)))
    learned.code_model.loss(found.codes[None]).backward()  # they are codes as any
    learned.zero_grad()


def test_digits_are_frames_too() -> None:
    """Frames of something else than sound: no samples, and an odd number of codes."""
    codec = Codec(CodecConfig(hop=64, quantizers=5, codes=16, masked=0, dim=16, heads=1, position="none"))
    images = scrambled((40, 64), 17).float()
    codec.quantizer(images[None])
    codes = codec.eval().quantizer.encode(images[None])[0]
    found = unpack(codec, pack(codec, codes, ladder=(8,)))
    assert torch.equal(found.codes, codes) and found.samples == 0


# ---- files of before, and of other machines --------------------------------------------------------------------------


def test_golden_files(codec: Codec) -> None:
    """Written once, on another machine perhaps: they are read here, and written again to the byte."""
    if pycore.cpu_isa() == "scalar":
        pytest.skip("plain loops compute other bits")
    golden = json.loads(GOLDEN.read_text())
    assert fingerprint(codec) == golden["fingerprint"] and len(golden["files"]) == len(CASES)
    for case, packed in zip(CASES, golden["files"], strict=True):
        codes, data = written(codec, case)
        assert torch.equal(unpack(codec, bytes.fromhex(packed)).codes, codes)
        assert data.hex() == packed


def test_another_instruction_set_reads_it(codec: Codec) -> None:
    """Written with AVX-512 and read with AVX2, in a process of its own, and the reverse."""
    isas = [isa for isa in pycore.native.available_isas() if isa != "scalar"]
    if not isas:
        pytest.skip("no vectors here")
    program = (
        "import sys; from tests.models.test_codec_file import *; codec = made(); case = CASES[5];"
        "sys.stdout.buffer.write(written(codec, case)[1]) if sys.argv[1] == 'w' else sys.exit(not torch.equal("
        "unpack(codec, sys.stdin.buffer.read()).codes, written(codec, case)[0]))"
    )

    def run(what: str, isa: str, given: bytes = b"") -> bytes:
        environment = {**os.environ, "PYCORE_CPU_ISA": isa, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", program, what]
        return subprocess.run(command, input=given, capture_output=True, check=True, env=environment, cwd=ROOT).stdout

    files = {isa: run("w", isa) for isa in isas}
    assert len(set(files.values())) == 1 and len(files[isas[0]]) > 100
    run("r", isas[0], files[isas[-1]])
    run("r", isas[-1], files[isas[0]])


@pytest.mark.usefixtures("isa")
def test_a_codec_has_another_fingerprint_with_other_weights_config_or_bits(codec: Codec) -> None:
    here = fingerprint(codec)
    other = made()
    assert fingerprint(other) == here
    with torch.no_grad():
        other.code_model.blocks[0].attention.key.weight[0, 0] += 2.0**-20
    assert fingerprint(other) != here
    other = made()
    other.quantizer.layers[0]._codebook.embed[0, 0, 0] = 2.0**-20
    assert fingerprint(other) != here
    data = pack(codec, scrambled((9, 4), 30))
    with pytest.raises(BitstreamError, match="was coded with another model"):
        unpack(other, data)
    before = pycore.cpu_isa()
    if before != "scalar":
        pycore.native.set_cpu_isa("scalar")
        try:
            with pytest.raises(BitstreamError, match="was coded with another model"):
                unpack(codec, data)
        finally:
            pycore.native.set_cpu_isa(before)


# ---- damage ----------------------------------------------------------------------------------------------------------


def test_every_damage_is_reported(codec: Codec) -> None:
    data = pack(codec, scrambled((80, 4), 30), segments=2, samples=70, ladder=(16, 4), step=64)
    for at in range(len(data)):
        bad = bytearray(data)
        bad[at] ^= 1 << at % 8
        with pytest.raises(BitstreamError):
            unpack(codec, bytes(bad))
    for end in range(len(data)):
        with pytest.raises(BitstreamError):
            unpack(codec, data[:end])
    for more in (b"\0", b"PCCF", data):
        with pytest.raises(BitstreamError):
            unpack(codec, data + more)


def resealed(data: bytes, **fields: int) -> bytes:
    """The file with other fields of the header, and the CRC that belongs to them."""
    names = ("magic", "version", "stages", "segments", "widths", "step", "check", "frames", "samples")
    header: dict[str, Any] = dict(zip(names, HEADER.unpack_from(data), strict=True)) | fields | {"check": 0}
    body = data[HEADER.size :]
    header["check"] = zlib.crc32(body, zlib.crc32(HEADER.pack(*header.values())))
    return HEADER.pack(*header.values()) + body


FORGED: list[tuple[dict[str, Any], str | None]] = [
    ({"magic": b"PCCE"}, "data does not begin as a codec's files do"),
    ({"version": 2}, "data has version 2 and must have 1"),
    ({"stages": 0}, "data claims 320 codes, 80 frames of 0"),
    ({"stages": 5, "frames": 64}, "data claims 320 codes, 64 frames of 5"),
    ({"frames": 81}, "data claims 320 codes, 81 frames of 4"),
    ({"frames": 1 << 31}, "data claims 320 codes"),
    ({"segments": 0}, "80 frames of 4 in 0 segments"),
    ({"segments": 79}, "80 frames of 4 in 79 segments"),
    ({"samples": 79 * 24 + 1}, "and 1897 samples, which cannot be"),
    ({"step": 65}, "data has a ladder that none has: Staircase: step is 65"),
    ({"step": 0}, "data has a ladder that none has: codec_file: step is 0"),
    ({"widths": 1}, None),
    ({"widths": 255}, None),
    ({"segments": 1}, "data"),
]


@pytest.mark.parametrize("fields, message", FORGED, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_forged_files_are_refused(codec: Codec, fields: dict[str, Any], message: str | None) -> None:
    data = pack(codec, scrambled((80, 4), 30), segments=2, samples=70, ladder=(16, 4), step=64)
    assert torch.equal(unpack(codec, resealed(data)).codes, scrambled((80, 4), 30))
    with pytest.raises(BitstreamError, match=message):
        unpack(codec, resealed(data, **fields))


def test_a_forged_ladder_is_refused(codec: Codec) -> None:
    data = bytearray(pack(codec, scrambled((80, 4), 30), ladder=(16, 4), step=64))
    for ladder in (b"\4\20", b"\3\2"):
        data[HEADER.size : HEADER.size + 2] = ladder
        with pytest.raises(BitstreamError, match="data has a ladder that none has: Staircase: bits"):
            unpack(codec, resealed(bytes(data)))
    rope = Codec(CodecConfig(hop=24, quantizers=4, codes=30, dim=32, heads=2))
    plain = pack(rope, scrambled((80, 4), 30))
    ruled = struct.pack("<B", 16) + plain[HEADER.size :]
    with pytest.raises(BitstreamError, match="data has a ladder that none has: codec_file: position is 'rope'"):
        unpack(rope, resealed(plain[: HEADER.size] + ruled, widths=1, step=64))


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "codes, options, error, message",
    [
        (torch.zeros(3, 5, dtype=torch.int64), {}, ValueError, r"codes has shape \[3, 5\]"),
        (torch.zeros(3, 4), {}, ValueError, "codes has shape .* of torch.float32"),
        (torch.full((3, 4), 30), {}, IndexError, "codes has entries that are not 0 to 29, and must not"),
        (torch.full((3, 4), -1), {}, IndexError, "codes has entries that are not 0 to 29, and must not"),
        (torch.zeros(3, 4, dtype=torch.int64), {"samples": 49}, ValueError, "samples is 49 and must be at most 48"),
        (torch.zeros(3, 4, dtype=torch.int64), {"segments": 256}, ValueError, "segments is 256 and must be at most"),
        (torch.zeros(3, 4, dtype=torch.int64), {"ladder": (4, 8)}, ValueError, r"Staircase: bits\[1\] is 8"),
        (torch.zeros(3, 4, dtype=torch.int64), {"ladder": (8,), "step": 100}, ValueError, "step is 100"),
    ],
)
def test_errors(codec: Codec, codes: Tensor, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pack(codec, codes, **options)


def test_rotations_take_no_ladder() -> None:
    rope = Codec(CodecConfig(hop=24, quantizers=4, codes=30, dim=32, heads=2))
    with pytest.raises(ValueError, match="^codec_file: position is 'rope', whose rotations no ladder takes"):
        pack(rope, torch.zeros(3, 4, dtype=torch.int64), ladder=(16, 8))
    with pytest.raises(ValueError, match="^CodecConfig: position is 'here' and must be one of rope, "):
        CodecConfig(position="here")
    with pytest.raises(TypeError, match="^codec_file.unpack: data is a str"):
        unpack(rope, "no bytes")  # type: ignore[arg-type]


# ---- a codec as a file, and the command ------------------------------------------------------------------------------


def test_save_and_load(learned: Codec, tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    save_codec(learned, tmp_path / "codec.pt", {"steps": 3})
    again = load_codec(tmp_path / "codec.pt")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert fingerprint(again) == fingerprint(learned) and not again.training and again.config == learned.config
    sound = synthetic_vowels(0.2, seed=4)
    assert torch.equal(again.encode(sound), learned.encode(sound))
    assert [path.name for path in tmp_path.iterdir()] == ["codec.pt"]
    (tmp_path / "other.pt").write_bytes(b"no codec")
    with pytest.raises(ValueError, match="^load_codec: path is '.*other.pt' and must be a file of save_codec$"):
        load_codec(tmp_path / "other.pt")


def test_command(learned: Codec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_codec(learned, tmp_path / "codec.pt")
    sound, model = tmp_path / "sound.wav", ["--codec", str(tmp_path / "codec.pt")]
    write_wav(sound, synthetic_vowels(0.3, sample_rate=32000, seed=4), 32000)
    assert codec_command.main(["encode", str(sound), *model, "--codebooks", "3", "--ladder", "16", "8", "4"]) == 0
    packed = tmp_path / "sound.wav.pccf"
    said = capsys.readouterr().out
    assert said.startswith(f"{packed}: {packed.stat().st_size} bytes for 0.30 s, 201 frames of 3 codes; ")
    found = unpack(learned, packed.read_bytes())
    assert found.codes.shape == (201, 3) and found.ladder == (16, 8, 4) and found.samples == 4800
    assert codec_command.main(["decode", str(packed), *model]) == 0
    decoded, rate = read_wav(tmp_path / "sound.decoded.wav")
    assert rate == 16000 and len(decoded) == 4800
    expected = learned.decode(found.codes, length=4800)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1 / 16000)


def test_command_writes_nothing_after_an_error(
    learned: Codec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_codec(learned, tmp_path / "codec.pt")
    model = ["--codec", str(tmp_path / "codec.pt")]
    data = bytearray(pack(learned, scrambled((9, 4), 30), samples=100))
    data[-1] ^= 1
    (tmp_path / "bad.pccf").write_bytes(data)
    (tmp_path / "frames.pccf").write_bytes(pack(learned, scrambled((9, 4), 30)))
    (tmp_path / "no.wav").write_bytes(b"no sound")
    write_wav(tmp_path / "empty.wav", torch.zeros(0), 16000)
    before = sorted(tmp_path.iterdir())
    for arguments, message in (
        (["decode", str(tmp_path / "bad.pccf"), *model], "data is damaged or not whole: its CRC is another"),
        (["decode", str(tmp_path / "frames.pccf"), *model], "holds frames of no waveform, and must hold sound"),
        (["decode", str(tmp_path / "none.pccf"), *model], "No such file"),
        (["encode", str(tmp_path / "empty.wav"), *model], "empty.wav has no samples, and must have some"),
        (["encode", str(tmp_path / "no.wav"), *model], "is no WAV file that can be read"),
        (["encode", str(tmp_path / "no.wav"), "--codec", str(tmp_path / "no.wav")], "must be a file of save_codec"),
    ):
        assert codec_command.main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("codec: ") and message in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


if __name__ == "__main__":  # writes the golden file
    maker = made()
    files = [written(maker, case)[1].hex() for case in CASES]
    GOLDEN.write_text(json.dumps({"fingerprint": fingerprint(maker), "files": files}, indent=1) + "\n")

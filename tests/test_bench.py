# SPDX-License-Identifier: Apache-2.0
"""The benchmark report's arithmetic, that its peers compute what they are compared for, and rehearsals for a GPU."""

from __future__ import annotations

import json
import pathlib
import subprocess
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from bench import bench_attention_cuda, captured, case, flash_pair, inputs, measure, peers, report, sweeps
from tools import sanitize_cuda


def small_run() -> dict[str, Any]:
    def one(name: str, group: str, axis: list[Any] | None, ours: list[float], theirs: list[float]) -> dict[str, Any]:
        return {
            "name": name,
            "group": group,
            "device": "cpu",
            "axis": axis,
            "flops": 2e9,
            "bytes": 0.0,
            "subject": "pycore",
            "gemm_ms": [100.0],
            "results": {
                "pycore": {"error": 1e-7, "ms": ours, "peak_bytes": 3 * 2**19},
                "peer": {"error": 2e-7, "ms": theirs},
            },
            "skipped": {"other": "no compiler"},
        }

    return {
        "version": 1,
        "quick": True,
        "machine": {
            "cpu": "A CPU", "cores": 2, "threads": 2, "pycore_isa": "avx2", "torch": "2.13.0", "torch_isa": "AVX2",
            "commit": "abc", "date": "2026-01-02T03:04Z",
        },
        "limits": {"gemm_gflops": 100.0, "read_gbs": 30.0},
        "gemm_flops": 2e10,  # 200 GFLOP/s in 100 ms
        "cases": [
            one("main", "rows", None, [10.0, 20.0, 30.0], [80.0]),
            one("short", "sweep", ["length", 4096.0], [4.0], [4.0]),
            one("long", "sweep", ["length", 8192.0], [12.0], [8.0]),
        ],
        "failures": [],
    }  # fmt: skip


def test_pages_of_docs_hold_what_their_results_say(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(small_run()))
    table = report.beside(small_run())
    assert "| main | 20.0 | 50% | 1.50 | peer 4.00× |" in table.splitlines()
    page = "Before.\n\n<!-- bench:start beside run.json -->\nold\n<!-- bench:end -->\n\nBehind.\n"
    assert report.renewed(page) == page.replace("old", table)
    assert report.renewed(report.renewed(page)) == report.renewed(page)


def test_rows_hold_ratios_and_shares_of_the_limit_measured_beside_them() -> None:
    ours, theirs = report.rows(small_run())[:2]
    assert (ours.low, ours.median, ours.high, ours.rounds) == (15.0, 20.0, 25.0, 3)
    assert ours.ratio is None and theirs.ratio == 4.0
    assert ours.gflops == pytest.approx(100.0)
    assert ours.share == pytest.approx(0.5)  # of the 200 measured in that case, not of the run's 100
    assert ours.peak_mb == 1.5 and theirs.peak_mb is None


def test_where_bytes_are_the_limit_the_share_is_of_memory_reads() -> None:
    run = small_run()
    run["cases"][0] |= {"flops": 0.0, "bytes": 3e8}
    ours = report.rows(run)[0]
    assert ours.gflops is None and ours.gbs == pytest.approx(15.0) and ours.share == pytest.approx(0.5)
    run["read_bytes"], run["cases"][0]["read_ms"] = 1.2e9, [10.0, 20.0, 30.0]  # 60 GB/s in that case
    assert report.rows(run)[0].share == pytest.approx(0.25)


def test_on_a_gpu_the_limits_are_copying_and_the_matrix_product_of_the_dtype() -> None:
    run = small_run()
    run["limits"] = {"gemm_gflops": 1.0, "gemm_bf16_gflops": 400.0, "copy_gbs": 60.0}
    for record in run["cases"]:
        record |= {"gemm_ms": None, "limit": case.gemm_limit(torch.bfloat16, "cuda")}
    assert report.rows(run)[0].share == pytest.approx(0.25)
    run["cases"][0] |= {"flops": 0.0, "bytes": 3e8}
    assert report.rows(run)[0].share == pytest.approx(0.25)
    assert case.gemm_limit(torch.bfloat16, "cpu") == case.gemm_limit(torch.float32, "cuda") == "gemm_gflops"


def test_time_by_density_is_held_against_causal_attention() -> None:
    run = small_run()
    assert sweeps.by_density(run) == []
    for record, density in zip(run["cases"], (1.0, 0.5, 0.25), strict=True):
        record |= {"group": "sweep", "axis": ["density", density]}
    run["cases"][0]["results"]["pycore, causal"] = {"error": 0.0, "ms": [16.0]}
    expected = "sweep: pycore's time over density × that of causal attention: 3.00 at 0.25, 0.50 at 0.50, 1.25 at 1.00"
    assert sweeps.by_density(run) == [expected]
    assert report.text_table(run).endswith(expected) and expected not in report.markdown(run)


def test_tables_say_everything_once() -> None:
    text = report.text_table(small_run())
    assert text.count("A CPU") == 1 and "main" in text and "4.00×" in text
    assert "main: other left out (no compiler)" in text
    assert "1.50× the time per token at 8192 as at 4096" in text
    table = report.markdown(small_run())
    assert "| main | pycore | 20.0 | 15.0–25.0 |  | 100 |  | 50% | 1.50 |" in table
    assert "| short" not in table


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), (0.0, "0"), (0.123, "0.12"), (9.876, "9.88"), (12.34, "12.3"), (1234.5, "1234")]
)
def test_number(value: float | None, text: str) -> None:
    assert report.number(value) == text


def test_insert_replaces_what_is_between_the_markers_and_is_stable() -> None:
    before = "# Title\n<!-- bench:start full -->\nold\n<!-- bench:end -->\nrest\n"
    once = report.insert(before, small_run(), "bench/results/x.json")
    start = "# Title\n<!-- bench:start full bench/results/x.json -->\n"
    assert once == f"{start}{report.markdown(small_run())}\n<!-- bench:end -->\nrest\n"
    assert report.insert(once, small_run(), "bench/results/x.json") == once
    assert report.source_of(once) == "bench/results/x.json" and report.source_of(before) is None
    with pytest.raises(ValueError, match="bench:start"):
        report.insert("no markers", small_run(), "x")
    with pytest.raises(ValueError, match="without a line <!-- bench:end"):
        report.insert("<!-- bench:start full -->\n", small_run(), "x")


def test_the_summary_names_ratios_of_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = report.rows(small_run())[:2]
    monkeypatch.setattr(report, "SUMMARY", (ours.case,))
    monkeypatch.setattr(report, "HIGHLIGHTS", {ours.case: f"{{{theirs.contender}}} as fast."})
    ratio = report.number(theirs.ratio, "×")
    assert f"| {ours.case} | {report.number(ours.median)} | {theirs.contender} {ratio}" in report.summary(small_run())
    assert report.highlights(small_run()) == f"- {ratio} as fast."


def test_rounds_are_spread_evenly_and_fit_the_effort() -> None:
    effort = measure.Effort(seconds=2.0, least=3, most=11)
    assert [measure.rounds_for(seconds, effort) for seconds in (0.001, 0.4, 5.0, 20.0)] == [11, 5, 3, 2]
    taken = [measure.turn(i, 3, 11) for i in range(11)]
    assert sum(taken) == 3 and taken[3] and taken[7] and taken[10]


class Rounds:
    """What run_case needs of pytest-benchmark."""

    def __init__(self, start: Any = None) -> None:
        self.start = start or (lambda: None)

    def pedantic(self, call: Any, setup: Any, rounds: int) -> None:
        self.start()
        for _ in range(rounds):
            setup()
            call()


def test_peers_take_turns_in_other_orders_and_steps_follow_steps() -> None:
    """Each turn is one call outside the clock and one inside it; another peer comes before the subject."""
    calls: list[str] = []

    def one(name: str) -> case.Prepare:
        def call() -> list[torch.Tensor]:
            calls.append(name)
            return [torch.zeros(1)]

        return lambda _: call

    names = ["subject", "a", "b", "c"]
    given = case.Case(
        "steps",
        "steps",
        lambda: None,
        {name: one(name) for name in names},
        lambda _: lambda outputs: 0.0,
        1.0,
        before=1,
    )
    record = measure.run_case(given, Rounds(calls.clear), measure.Effort(seconds=1.0, least=12, most=12))
    assert {name: len(result["ms"]) for name, result in record["results"].items()} == dict.fromkeys(names, 12)
    assert calls[::2] == calls[1::2]
    turns = [calls[at : at + 8 : 2] for at in range(0, len(calls), 8)]
    assert all(sorted(turn) == sorted(names) and turn[-1] == "subject" for turn in turns)
    assert {turn[-2] for turn in turns} == {"a", "b", "c"}


@pytest.mark.parametrize(("flops", "moved"), [(0.0, 8.0), (8.0, 0.0), (0.0, 0.0)])
def test_the_limit_takes_turns_with_the_contenders(flops: float, moved: float, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(measure.machine, "sgemm", lambda: lambda: called.append("gemm"))
    monkeypatch.setattr(measure.machine, "memory_read", lambda: lambda: called.append("read"))
    monkeypatch.setattr(measure, "SETTLE_SECONDS", 0.0)
    x = torch.ones(2)
    work = case.Case(
        name="copy",
        group="copies",
        inputs=lambda: x,
        contenders={"pycore": lambda given: lambda: (given,), "peer": lambda given: lambda: (given.clone(),)},
        check=lambda given: lambda outputs: case.largest_error(outputs, [given]),
        tolerance=0.0,
        flops=flops,
        bytes=moved,
        device="cpu",
    )
    record = measure.run_case(work, Rounds(), measure.Effort(seconds=1.0, least=3, most=3))
    limit = {8.0: "gemm"}.get(flops, "read" if moved else None)
    assert set(record["results"]) == {"pycore", "peer"} and set(called) == ({limit} if limit else set())
    for name in ("gemm", "read"):
        assert (record[f"{name}_ms"] is not None) == (name == limit)
    assert limit is None or len(record[f"{limit}_ms"]) == len(record["results"]["pycore"]["ms"]) == 3


def test_largest_error_refuses_nan_and_wrong_shapes() -> None:
    reference = [torch.tensor([2.0, -4.0], dtype=torch.float64)]
    assert case.largest_error([torch.tensor([2.0, -3.0])], reference) == 0.25
    assert case.largest_error([torch.tensor([2.0, float("nan")])], reference) == float("inf")
    assert case.largest_error([torch.tensor([2.0])], reference) == float("inf")


@pytest.mark.parametrize(("length", "sink", "window"), [(700, 5, 300), (600, 16, 64), (257, 300, 10), (300, 0, 2)])
def test_peers_compute_the_same_attention(length: int, sink: int, window: int) -> None:
    generator = torch.Generator().manual_seed(length)
    query, key, value = (torch.randn(1, 2, length, 8, generator=generator) for _ in range(3))
    starts = list(range(0, length, peers.CHUNK))
    expected = [peers.reference(query, key, value, sink, window, starts)]
    for peer in (peers.masked_sdpa, peers.chunked_sdpa):
        assert case.largest_error([peer(query, key, value, sink, window)()], expected) < 1e-5
    rotated = [peers.reference(query, key, value, sink, window, starts, rope=True)]
    assert case.largest_error([peers.chunked_rope(query, key, value, sink, window)()], rotated) < 1e-5
    assert case.largest_error(expected, rotated) > 1e-3
    positions = torch.arange(length)
    assert peers.kept_pairs(length, sink, window) == int(peers.lambda_mask(positions, positions, sink, window).sum())
    assert peers.kept_pairs(length) == length * (length + 1) // 2


# Windows as long as the text, sinks that all queries see through the window, one sink, none, and a text of one window.
PAIRS = [
    (700, 5, 300),
    (600, 16, 64),
    (257, 300, 10),
    (300, 0, 2),
    (100, 1, 10),
    (46, 16, 30),
    (45, 16, 30),
    (30, 4, 50),
]


@pytest.mark.parametrize(("length", "sink", "window"), PAIRS)
def test_two_flash_attention_calls_merge_to_lambda_attention(length: int, sink: int, window: int) -> None:
    tensors = [torch.randn(2, 2, length, 8, requires_grad=True) for _ in range(3)]
    grad = torch.randn(2, 2, length, 8)
    out = flash_pair.flash_pair(*tensors, sink, window)()
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected = peers.reference(*exact, sink, window, list(range(0, length, peers.CHUNK)))
    found = [out, *torch.autograd.grad(out, tensors, grad)]
    assert case.largest_error(found, [expected, *torch.autograd.grad(expected, exact, grad.double())]) < 2e-6


def test_flash_attention_takes_what_the_pair_gives_it() -> None:
    """The ops are there on CUDA only, but the meta device checks their arguments and says what they return."""
    tensors = [torch.empty(1, 2, 300, 128, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    out = flash_pair.flash_pair(*tensors, 16, 64)()
    grads = torch.autograd.grad(out, tensors, torch.empty_like(out))
    assert all(x.shape == tensors[0].shape and x.dtype == torch.bfloat16 for x in (out, *grads))


SMALL = bench_attention_cuda.Sizes(640, 384, heads=2, windows=(200, 64), keys=300, exact=200, device="cpu")
ON_A_GPU = list(bench_attention_cuda.all_cases(quick=False, sizes=SMALL))


@pytest.mark.parametrize("work", ON_A_GPU, ids=lambda work: work.name)
def test_contenders_of_a_gpu_agree_on_the_cpu(work: case.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "compile_flex", lambda: flex_attention)
    inputs = work.inputs()
    check = work.check(inputs)
    for name, prepare in work.contenders.items():
        if "backward" in work.name and "Flex" in name:
            continue  # which it does not have on the CPU
        assert check(prepare(inputs)()) <= work.tolerance, name


def test_cases_of_a_gpu() -> None:
    sizes = bench_attention_cuda.Sizes(device="cpu")  # nothing is made before a case is run
    quick = list(bench_attention_cuda.all_cases(quick=True, sizes=sizes))
    names = [work.name for work in quick]
    assert len(set(names)) == len(names) and len({work.name for work in ON_A_GPU}) == len(ON_A_GPU)
    assert sum("compiled FlexAttention" in work.contenders for work in quick) <= 6  # each takes many seconds to compile
    assert list(bench_attention_cuda.cases(case.Options(device="cpu"))) == []
    # 16 heads, 16384 * 16385 / 2 pairs, 4 * 128 operations
    assert quick[0].flops == 16 * 16384 * 16385 / 2 * 4 * 128
    assert {work.bytes for work in quick if work.name.startswith("decode, batch 8")} == {2.0 * 8 * 8 * 32768 * 128 * 2}


def test_what_the_sanitizer_runs() -> None:
    for name, dtype, program in sanitize_cuda.programs(reduced=True):
        for first, again in zip(program("cpu"), program("cpu"), strict=True):
            assert torch.equal(first, again) and first.isfinite().all(), (name, dtype)


def test_the_script_for_a_gpu_machine_parses() -> None:
    script = pathlib.Path(sanitize_cuda.__file__).with_name("device.sh")
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


@pytest.mark.real_model
@pytest.mark.skipif(not captured.present(), reason="python examples/smollm2.py fetches the model")
def test_inputs_of_a_real_model_are_its_three_layers() -> None:
    """Softmax of its own scores: what a layer attends to, most of it the first token (an attention sink)."""
    query, key, value = inputs.attention_inputs(captured.NAME, captured.HEADS, 512, captured.HEAD_DIM)
    assert query.shape == key.shape == value.shape == (3, 9, 512, 64)
    assert torch.equal(key[:, 0], key[:, 1]) and not torch.equal(key[:, 0], key[:, 3])  # three heads share one
    weights = query[2, :, 256:] @ key[2].mT * 64**-0.5
    causal = torch.arange(256, 512)[:, None] >= torch.arange(512)
    first = weights.masked_fill(~causal, -torch.inf).softmax(-1)[..., 0].mean()
    assert first > 0.2 and value.isfinite().all()

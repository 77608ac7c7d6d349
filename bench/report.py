# SPDX-License-Identifier: Apache-2.0
"""Tables and plots from the JSON of one run.

python -m bench.report bench/results/X.json             the terminal table and the plots again
python -m bench.report --readme bench/results/X.json    writes its tables into README.md and bench/README.md
python -m bench.report --check                          exit status 1 unless they hold exactly these tables

Pages of docs/ name the results file of each of their tables in its first line, and --readme and --check mean them too.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench import sweeps

ROOT = pathlib.Path(__file__).resolve().parent.parent
END_MARKER = "<!-- bench:end -->"
_START = re.compile(r"<!-- bench:start (full|summary|highlights|beside)(?: (\S+))? -->\n")


@dataclass(frozen=True)
class Row:
    """One contender in one case: times in milliseconds, None where a notion does not apply."""

    group: str
    case: str
    contender: str
    median: float
    low: float
    high: float
    rounds: int
    ratio: float | None
    gflops: float | None
    gbs: float | None
    share: float | None
    peak_mb: float | None
    error: float


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile; of one value, that value thrice."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def rows(run: Mapping[str, Any]) -> list[Row]:
    """Every measured contender of a run, in the order of the cases."""
    limits = run["limits"]
    found = []
    for case in run["cases"]:
        read = limits.get("read_gbs") or limits.get("copy_gbs")  # a GPU's reads are held against its copies
        if case.get("read_ms"):
            read = run["read_bytes"] / statistics.median(case["read_ms"]) / 1e6
        gemm = limits.get(case.get("limit", "gemm_gflops"))
        if case.get("gemm_ms"):
            gemm = run["gemm_flops"] / statistics.median(case["gemm_ms"]) / 1e6
        subject = case["subject"]
        subject_median = statistics.median(case["results"][subject]["ms"])
        for name, result in case["results"].items():
            low, median, high = quartiles(result["ms"])
            gflops = case["flops"] / median / 1e6 if case["flops"] else None
            gbs = case["bytes"] / median / 1e6 if case["bytes"] else None
            speed, limit = (gbs, read) if gbs else (gflops, gemm)
            peak = result.get("peak_bytes")
            found.append(
                Row(
                    group=case["group"],
                    case=case["name"],
                    contender=name,
                    median=median,
                    low=low,
                    high=high,
                    rounds=len(result["ms"]),
                    ratio=None if name == subject else median / subject_median,
                    gflops=gflops,
                    gbs=gbs,
                    share=speed / limit if speed and limit else None,
                    peak_mb=None if peak is None else peak / 2**20,
                    error=result["error"],
                )
            )
    return found


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits without an exponent; an empty string for None."""
    if value is None:
        return ""
    if value == 0 or abs(value) >= 100:
        return f"{value:.0f}{unit}"
    return f"{value:.{2 if abs(value) < 10 else 1}f}{unit}"


_COLUMNS = ("contender", "median ms", "quartiles", "n", "ratio", "GFLOP/s", "GB/s", "of limit", "peak MB", "error")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.contender,
        number(row.median),
        f"{number(row.low)}–{number(row.high)}",
        str(row.rounds),
        number(row.ratio, "×"),
        number(row.gflops),
        number(row.gbs),
        "" if row.share is None else f"{row.share:.0%}",
        "" if row.peak_mb is None else number(row.peak_mb),
        f"{row.error:.0e}",
    )


def text_table(run: Mapping[str, Any]) -> str:
    """The table for a terminal: one block per group, one line per contender."""
    all_rows = rows(run)
    name_width = max([len(row.case) for row in all_rows] + [4])
    body = [_cells(row) for row in all_rows]
    widths = [max(len(line[i]) for line in [_COLUMNS, *body]) for i in range(len(_COLUMNS))]
    header = f"  {'case':<{name_width}}  " + _aligned(_COLUMNS, widths)
    lines = [machine_line(run), limits_line(run), "", header]
    group = case = None
    for row, cells in zip(all_rows, body, strict=True):
        if row.group != group:
            lines += ["", row.group]
            group, case = row.group, None
        lines.append(f"  {row.case if row.case != case else '':<{name_width}}  " + _aligned(cells, widths))
        case = row.case
    lines += ["", *footnotes(run), *sweeps.by_density(run)]  # beside the table in a README there are no sweeps
    return "\n".join(line.rstrip() for line in lines)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    first = f"{cells[0]:<{widths[0]}}"
    return "  ".join([first, *(f"{cell:>{width}}" for cell, width in zip(cells[1:], widths[1:], strict=True))])


def machine_line(run: Mapping[str, Any]) -> str:
    """One sentence on where and when a run was made."""
    machine = run["machine"]
    parts = [f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"]
    if machine.get("gpu"):
        parts.insert(0, f"{machine['gpu']}, CUDA {machine['cuda']}")
    if machine.get("pycore_isa"):
        parts.append(f"pycore on {machine['pycore_isa']}")
    parts.append(f"torch {machine['torch']} on {machine['torch_isa']}")
    if machine.get("commit"):
        parts.append(f"commit {machine['commit']}")
    return ", ".join([*parts, machine["date"]]) + (" (quick run)" if run["quick"] else "")


def limits_line(run: Mapping[str, Any]) -> str:
    """One sentence on the machine's limits in the same run."""
    names = {
        "gemm_gflops": "float32 GEMM {} GFLOP/s",
        "gemm_bf16_gflops": "bfloat16 GEMM {} GFLOP/s",
        "fma_gflops": "FMA {} GFLOP/s",
        "read_gbs": "memory read {} GB/s",
        "copy_gbs": "memory copy {} GB/s",
    }
    found = [text.format(f"{run['limits'][key]:.0f}") for key, text in names.items() if run["limits"].get(key)]
    return "Limits in this run: " + ", ".join(found)


def footnotes(run: Mapping[str, Any]) -> list[str]:
    """What the table does not show: peers that could not run, failed cases, and how cost grows along a sweep."""
    notes = []
    for case in run["cases"]:
        notes += [f"{case['name']}: {name} left out ({reason})" for name, reason in case["skipped"].items()]
        if case.get("error_is"):
            errors = ", ".join(f"{name} {result['error']:.1g}" for name, result in case["results"].items())
            notes.append(f"{case['name']}: {case['error_is']}: {errors}")
    notes += [f"FAILED {failure}" for failure in run.get("failures", [])]
    return [*notes, *sweeps.by_length(run)]


def plots(run: Mapping[str, Any], folder: pathlib.Path, stem: str) -> list[pathlib.Path]:
    """Writes one PNG per sweep, time against its axis; none without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for group, axis, points in sweeps.sweeps(run):
        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        names = dict.fromkeys(name for _, case in points for name in case["results"])
        for name in names:
            line = [(x, quartiles(case["results"][name]["ms"])) for x, case in points if name in case["results"]]
            xs = [x for x, _ in line]
            axes.plot(xs, [middle for _, (_, middle, _) in line], marker="o", label=name)
            axes.fill_between(xs, [low for _, (low, _, _) in line], [high for _, (_, _, high) in line], alpha=0.2)
        label = "share of the blocks" if axis == "density" else f"{axis} (tokens)"
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="milliseconds", title=group)
        axes.set_xscale("log", base=2)
        axes.grid(True, which="both", alpha=0.3)
        axes.legend()
        figure.supxlabel(machine_line(run), fontsize=6)
        path = folder / f"{stem}-{axis}.png"
        if path in written:  # another sweep over the same
            path = folder / f"{stem}-{axis}-{len(written) + 1}.png"
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        written.append(path)
    return written


def markdown(run: Mapping[str, Any]) -> str:
    """The results table of bench/README.md: every case that is not a point of a sweep."""
    sweeps = {case["name"] for case in run["cases"] if case.get("axis")}
    lines = [
        f"{machine_line(run)}. {limits_line(run)}.",
        "",
        "| work | contender | median ms | quartiles | over pycore | GFLOP/s | GB/s | of limit | peak memory MB |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    case = None
    for row in rows(run):
        if row.case in sweeps:
            continue
        _, median, spread, _, ratio, gflops, gbs, share, peak, _ = _cells(row)
        first = row.case if row.case != case else ""
        cells = (first, row.contender, median, spread, ratio, gflops, gbs, share, peak)
        lines.append(f"| {' | '.join(cells)} |")
        case = row.case
    notes = [note for note in footnotes(run) if not note.startswith("FAILED")]
    return "\n".join([*lines, *(["", *[f"- {note}" for note in notes]] if notes else [])])


# What README.md shows of a run: three sentences, each on one case, that name contenders in braces for their times over
# pycore's; and the cases of its table. bench/README.md has them all.
HIGHLIGHTS = {
    "Λ forward, L 8192": (
        "Λ attention over 8192 tokens is {masked SDPA} as fast as SDPA with the mask and {compiled FlexAttention} as "
        "fast as FlexAttention, compiled;"
    ),
    "Λ forward and backward, L 4096": (
        "with its gradients, over 4096 tokens, {masked SDPA} as fast as SDPA with the mask and {chunked SDPA} as fast "
        "as SDPA in chunks with gathered keys;"
    ),
    "decode, 2 layers of 32768 keys, bfloat16": (
        "a decoding step over 32,768 keys is {SDPA, heads folded} as fast as SDPA with the heads folded by hand."
    ),
}
SUMMARY = (
    "Λ forward, L 8192",
    "causal forward, L 8192",
    "Λ forward and backward, L 4096",
    "Λ forward, L 8192, bfloat16",
    "decode, 2 layers of 32768 keys, bfloat16",
    "Λ decode, window 4096, float32",
    "coder, decode, one model, 262144 symbols",
    "linear forward and backward, 2048 rows, 512 to 512",
)


def highlights(run: Mapping[str, Any]) -> str:
    """Three sentences, a line each."""
    found = rows(run)
    ratios = {case: {row.contender: number(row.ratio, "×") for row in found if row.case == case} for case in HIGHLIGHTS}
    return "\n".join(f"- {text.format_map(ratios[case])}" for case, text in HIGHLIGHTS.items())


def summary(run: Mapping[str, Any]) -> str:
    """The results table of README.md: a line for each case of SUMMARY, slower contenders as multiples."""
    lines = [f"{machine_line(run)}.", "", "| work | pycore, ms | times as long |", "|---|--:|---|"]
    found = rows(run)
    for case in SUMMARY:
        mine, *peers = (row for row in found if row.case == case)
        others = "; ".join(f"{row.contender} {number(row.ratio, '×')}" for row in peers)
        lines.append(f"| {case} | {number(mine.median)} | {others} |")
    return "\n".join(lines)


def beside(run: Mapping[str, Any]) -> str:
    """A table for a page of docs/: for each case the subject's time, share of the limit and memory, and its peers."""
    lines = [
        f"{machine_line(run)}. {limits_line(run)}.",
        "",
        "| work | pycore, ms | of limit | memory MB | times as long (memory MB) |",
        "|---|--:|--:|--:|---|",
    ]
    found = rows(run)
    for case in dict.fromkeys(row.case for row in found):
        mine, *peers = (row for row in found if row.case == case)
        share = "" if mine.share is None else f"{mine.share:.0%}"
        others = "; ".join(
            f"{row.contender} {number(row.ratio, '×')}" + (f" ({number(row.peak_mb)})" if row.peak_mb else "")
            for row in peers
        )
        lines.append(f"| {case} | {number(mine.median)} | {share} | {number(mine.peak_mb)} | {others} |")
    return "\n".join(lines)


TABLES = {"full": markdown, "summary": summary, "highlights": highlights, "beside": beside}
DOCUMENTS = (ROOT / "README.md", ROOT / "bench" / "README.md")


def pages() -> list[pathlib.Path]:
    """Pages of docs/ that have tables of results."""
    return [path for path in sorted((ROOT / "docs").rglob("*.md")) if _START.search(path.read_text())]


def renewed(document: str) -> str:
    """The document with each table as the results file says that its own start marker names."""
    parts = _START.split(document)
    text = parts[0]
    for kind, source, rest in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        after = rest.partition(END_MARKER)[2]
        run = json.loads((ROOT / source).read_text())
        text += f"<!-- bench:start {kind} {source} -->\n{TABLES[kind](run)}\n{END_MARKER}{after}"
    return text


def insert(document: str, run: Mapping[str, Any], source: str) -> str:
    """The document with the tables of a run between its markers, each start marker naming the source.

    Raises:
        ValueError: the document has no markers, or a start without an end.
    """
    parts = _START.split(document)
    if len(parts) == 1:
        raise ValueError(f"no line <!-- bench:start {'|'.join(TABLES)} --> followed by a line {END_MARKER}")
    text = parts[0]
    for kind, _, rest in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        _, end, after = rest.partition(END_MARKER)
        if not end:
            raise ValueError(f"a line <!-- bench:start {kind} --> without a line {END_MARKER}")
        text += f"<!-- bench:start {kind} {source} -->\n{TABLES[kind](run)}\n{END_MARKER}{after}"
    return text


def source_of(document: str) -> str | None:
    """Path of the results file that a document's first start marker names."""
    start = _START.search(document)
    return start.group(2) if start else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=pathlib.Path, help="JSON file of a run")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--readme", action="store_true", help="write the tables into the two README.md")
    action.add_argument("--check", action="store_true", help="compare the two README.md with their tables")
    options = parser.parse_args(arguments)
    if not (options.readme or options.check):
        if options.results is None:
            parser.error("name the JSON file of a run")
        run = json.loads(options.results.read_text())
        print(text_table(run))
        for path in plots(run, options.results.parent, options.results.stem):
            print(path)
        return 0
    given = options.results.resolve().relative_to(ROOT).as_posix() if options.results else None
    stale = False
    for path in (*DOCUMENTS, *pages()):
        document = path.read_text()
        source = given if given and path in DOCUMENTS else source_of(document)
        if source is None:
            parser.error(f"{path.name} names no results file; run --readme with one")
        if path in DOCUMENTS:
            updated = insert(document, json.loads((ROOT / source).read_text()), source)
        else:
            updated = renewed(document)
        if options.readme:
            path.write_text(updated)
        elif updated != document:
            name = path.relative_to(ROOT)
            print(f"{name} is not what {source} says; run: python -m bench.report --readme {source}")
            stale = True
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())

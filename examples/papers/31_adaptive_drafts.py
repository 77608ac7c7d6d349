# SPDX-License-Identifier: Apache-2.0
"""Liu et al., "Adaptive Draft-Verification for Efficient Large Language Model Decoding" (ADED, arXiv 2407.12021).

A table of trigrams (`pycore.ops.ngram_update`) proposes a tree of continuations (`ngram_draft`), one pass of the model
with the Tree schedule checks it, and the table learns from what was accepted: `pycore.models.draft`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from paper import Figures, Paper, Run, main

from pycore.models.draft import NgramTable, accepted, generate
from pycore.models.language import shipped

sys.path.append(str(Path(__file__).resolve().parents[2]))
from tools.train_bytelm import corpus  # noqa: E402

PAPER = Paper(
    31,
    "Adaptive Draft-Verification for Efficient Large Language Model Decoding",
    "drafts from a table of trigrams that learns while it decodes give several tokens a pass and change none",
    "the byte model that pycore ships; a table of 512 KB of the standard library's sources; two held-out files for each"
    " seed: 256 bytes of greedy text after 256 of theirs, and 4096 bytes of their own, as if the model had chosen them",
)
NODES, DEPTH, ADAPT = 64, 12, 0.04  # by 0.04 a table learns in the paper


def mean(lengths: Sequence[int]) -> float:
    """Bytes a pass."""
    return sum(lengths) / len(lengths)


def experiment(run: Run) -> dict[str, float]:
    """Bytes a pass on greedy and on real text, with a table that learns, that does not, and that has no corpus."""
    train, held_out = corpus()
    files = [data for _, data in held_out if len(data) > 8192]
    chosen = [files[(2 * run.seed + n) % len(files)] for n in range(run.pick(2, 1))]
    model, known = shipped(), [list(train[: run.pick(1 << 19, 1 << 14)])]
    count, real = run.pick(256, 16), run.pick(4096, 256)
    ways = {
        "learning": (True, {"nodes": NODES, "depth": DEPTH, "adapt": ADAPT}),
        "still": (True, {"nodes": NODES, "depth": DEPTH, "adapt": 0.0}),
        "without a corpus": (False, {"nodes": NODES, "depth": DEPTH, "adapt": ADAPT}),
        "of one branch": (True, {"nodes": 1, "depth": 1, "adapt": ADAPT}),
    }
    figures: dict[str, float] = {}
    same = 0
    for name, (built, options) in ways.items():
        greedy: list[int] = []
        own: list[int] = []
        for data in chosen:
            prompt = list(data[4096 : 4096 + 256])
            table = NgramTable.build(known) if built else NgramTable()
            table.update(prompt, options["adapt"])
            if name != "of one branch":
                drafted = generate(model, prompt, count, table, **options)
                greedy += drafted.lengths
                if name == "learning":
                    plain = generate(model, prompt, count, NgramTable(), nodes=0, adapt=0.0)
                    same += drafted.tokens == plain.tokens
            table = NgramTable.build(known) if built else NgramTable()
            own += accepted(table, list(data[:real]), **options)
        figures[f"{name}, bytes a pass on real text"] = mean(own)
        if greedy:
            figures[f"{name}, bytes a pass on greedy text"] = mean(greedy)
    return figures | {"texts that are those of plain decoding": same / len(chosen)}


def checks(f: Figures) -> list[tuple[bool, str]]:
    """The text is the same, there are several bytes a pass, and what learns gives more."""
    greedy, real = ("{}, bytes a pass on greedy text".format, "{}, bytes a pass on real text".format)
    return [
        (
            min(f.each["texts that are those of plain decoding"]) == 1.0 and min(f.each[greedy("learning")]) >= 2.5,
            f"{f[greedy('learning')]:.2f} bytes a pass of greedy text, byte for byte that of plain decoding (such text"
            f" repeats itself, which flatters drafts)",
        ),
        (
            f.above(real("learning"), real("still")),
            f"on real text {f[real('learning')]:.2f} bytes a pass with a table that learns, {f[real('still')]:.2f} with"
            f" one that does not, {f[real('without a corpus')]:.2f} with one that knows nothing but the text",
        ),
        (
            f.above(real("learning"), real("of one branch"), 0.3),
            f"{f[real('of one branch')]:.2f} with one draft a pass in place of a tree of {NODES}",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))

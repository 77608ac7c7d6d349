# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding of SmolLM2-135M with drafts, and plainly: by pycore, and by transformers with its own drafts.

Cases exist where `python examples/smollm2.py` has put the model. A prompt of held-out source of the standard library is
gone on with. Each contender's tokens have to be those of plain greedy decoding by the same library: rounding differs
between the two, and one near tie makes another text. The prompt is read inside the clock, by all of them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from bench.bench_model import _examples
from bench.case import Case, Options, Outputs, Prepare

NODES = 5
WEIGHTS = 134_515_008
LEARN = 1.0  # how much likelier the trigrams of the prompt and of what was decoded become
EXIT = 28  # of 30 layers: the quickest of 10, 20, 25 and 28
OURS, THEIRS = 0, 1


@functools.cache
def _own(dtype: torch.dtype) -> Any:
    from pycore.models.tokens import load_tokens

    return load_tokens(_examples().FOLDER, dtype)


@functools.cache
def _transformers(dtype: torch.dtype) -> Any:
    return _examples().load(dtype)[0]


class Text:
    """A prompt, and a table of trigrams of other sources."""

    def __init__(self, number: int, length: int, count: int, dtype: torch.dtype) -> None:
        sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
        from pycore.models.draft import NgramTable
        from tools.train_bytelm import corpus

        self.dtype, self.count = dtype, count
        train, held_out = corpus()
        files = [data for _, data in held_out if len(data) > 8000]
        model = _own(dtype)
        self.prompt = model.tokens(files[number * len(files) // 6])[:length]
        self.corpus = model.tokens(train[: 1 << 19])
        self.table = NgramTable.build([self.corpus])

    def decoded(self, library: int) -> list[int]:
        """Plain greedy decoding."""
        prepare = _plain if library == OURS else _generate()
        return prepare(self)()[0].tolist()


def _outputs(tokens: list[int], library: int) -> Outputs:
    return torch.tensor(tokens), torch.tensor(library)


def _plain(text: Text) -> Callable[[], Outputs]:
    from pycore.models.draft import NgramTable, generate

    model = _own(text.dtype)
    return lambda: _outputs(
        generate(model, text.prompt, text.count, NgramTable(), nodes=0, adapt=0.0, chain=True).tokens, OURS
    )


def _draft(chain: bool) -> Prepare:
    from pycore.models.draft import NgramTable, generate

    def prepare(text: Text) -> Callable[[], Outputs]:
        model = _own(text.dtype)

        def run() -> Outputs:
            table = NgramTable()
            table._arrays, table.pairs = tuple(x.clone() for x in text.table._arrays), text.table.pairs
            table.update(text.prompt, LEARN)
            return _outputs(
                generate(
                    model, text.prompt, text.count, table, nodes=NODES, depth=NODES, adapt=LEARN, chain=chain
                ).tokens,
                OURS,
            )

        return run

    return prepare


def _generate(**options: Any) -> Prepare:
    def prepare(text: Text) -> Callable[[], Outputs]:
        model = _transformers(text.dtype)
        ids = torch.tensor([[_own(text.dtype).bos, *text.prompt]])

        @torch.no_grad()
        def run() -> Outputs:
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=text.count, min_new_tokens=text.count,
                do_sample=False, **options,
            )  # fmt: skip
            return _outputs(found[0, ids.shape[1] :].tolist(), THEIRS)

        return run

    return prepare


def _check(text: Text) -> Callable[[Outputs], float]:
    expected = {library: text.decoded(library) for library in (OURS, THEIRS)}

    def error(outputs: Outputs) -> float:
        return 0.0 if outputs[0].tolist() == expected[int(outputs[1])] else float("inf")

    return error


def cases(options: Options) -> Iterable[Case]:
    """Two prompts, in two dtypes; the quick form one. CPU only, and only where the model is."""
    if options.device != "cpu" or not _examples().present():
        return
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    numbers: tuple[int, ...] = (0, 3)
    length, count = 256, 128
    if options.quick:
        dtypes, numbers, length, count = (torch.float32,), (0,), 64, 16
    for dtype in dtypes:
        for number in numbers:
            contenders: dict[str, Prepare] = {f"pycore, chains of {NODES}": _draft(True), "pycore, plain": _plain}
            if dtype == torch.float32 and not options.quick:
                # In 16 bits logits are so often equal that trees read everything anew.
                contenders[f"pycore, trees of {NODES}"] = _draft(False)
            contenders["transformers, plain"] = _generate()
            if not options.quick:
                contenders["transformers, prompt lookup 10"] = _generate(prompt_lookup_num_tokens=10)
                # Assisted decoding wants a small model of the same tokens. There is none of SmolLM2, so its own first
                # layers are one; no layer was trained to be the last.
                contenders[f"transformers, assisted by {EXIT} layers"] = _generate(assistant_early_exit=EXIT)
            yield Case(
                name=f"SmolLM2-135M, {count} tokens after {length} of file {number}, {str(dtype)[6:]}",
                group="drafts (SmolLM2-135M, greedy)",
                inputs=lambda number=number, dtype=dtype: Text(number, length, count, dtype),
                contenders=contenders,
                check=_check,
                tolerance=0.0,
                bytes=float(dtype.itemsize * WEIGHTS * count),  # what plain decoding has to read
            )


def bench_draft(case: Case, measure_case: Callable[[Case], None]) -> None:
    measure_case(case)

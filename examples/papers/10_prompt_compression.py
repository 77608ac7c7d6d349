# SPDX-License-Identifier: Apache-2.0
"""Pan et al., "LLMLingua-2: Data Distillation for Efficient and Faithful Task-Agnostic Prompt Compression"
(arXiv 2403.12968).

Which words of a prompt may go? An encoder that sees both sides (`pycore.schedules.Full`) is taught by examples; the
rule it is to beat keeps the words that surprise a causal model (`Causal`).
"""

import torch
from paper import Figures, Paper, Run, main
from torch import Tensor, nn

from pycore import ops
from pycore.models.bytelm import BytelmConfig
from pycore.models.transformer import Transformer
from pycore.schedules import Causal, Full, Schedule

PAPER = Paper(
    10,
    "LLMLingua-2: Data Distillation for Efficient and Faithful Task-Agnostic Prompt Compression",
    "deciding word by word with an encoder that sees both sides keeps what matters; the entropy of a causal model is"
    " neither aligned with that nor sees what comes behind",
    "made-up prompts of 48 words: 4 facts (a name, a value, and behind them a word that says they are one) among random"
    " pairs that look alike and a chain of filler words; a quarter of the words may stay; one block of width 48",
)
LENGTH, FACTS, NAMES, FILLER = 48, 4, 64, 24
FACT, CHAFF = NAMES + FILLER, NAMES + FILLER + 1
KEEP, COUNT = LENGTH // 4, 32
SHAPE = BytelmConfig(layers=1, dim=48, heads=4, kv_heads=4, max_distance=64)


def prompts(run: Run, count: int) -> tuple[Tensor, Tensor]:
    """Words [count, LENGTH] in 12 groups of four, and which of them matter: the names and values of facts."""
    groups = LENGTH // 4
    pairs = run.integers(NAMES, count, groups, 2)
    kind = run.uniform(count, groups).argsort(1)  # 0 to 3: facts, 4 to 7: chaff, then filler
    filler = NAMES + (run.integers(FILLER, count, groups, 1) + torch.arange(4)) % FILLER  # each follows from the last
    end = torch.where(kind < FACTS, FACT, CHAFF)[..., None]
    told = torch.cat([filler[..., :1], pairs, end], -1)
    words = torch.where((kind < 2 * FACTS)[..., None], told, filler).flatten(1)
    matter = (kind < FACTS)[..., None] & torch.tensor([False, True, True, False])
    return words, matter.flatten(1)


def scored(run: Run, name: str, schedule: Schedule, words: Tensor) -> Tensor:
    """How much a taught classifier, or surprise, wants each word to stay: [count, LENGTH]."""
    model = Transformer(SHAPE, vocabulary=NAMES + FILLER + 2)
    classes = nn.Parameter(torch.zeros(2, SHAPE.dim))

    def loss(step: int) -> Tensor:
        text, matter = prompts(run, COUNT)
        if name == "surprise":
            return model.loss(model(text[:, :-1]), text[:, 1:])
        return ops.linear_cross_entropy(model(text, schedule=schedule), classes, matter.long())

    run.fit(name, [*model.parameters(), classes], loss, 400)
    with torch.no_grad():
        states = model(words, schedule=schedule)
        if name != "surprise":
            scores = ops.invariant_linear(states, classes)
            return scores[..., 1] - scores[..., 0]
        bits = ops.linear_cross_entropy(states[:, :-1], model.embedding, words[:, 1:], reduction="none")
        return torch.cat([torch.zeros(len(words), 1), bits], 1)


def experiment(run: Run) -> dict[str, float]:
    """The share of facts whose name and value both stay."""
    words, matter = prompts(run, run.pick(500, 20))
    figures: dict[str, float] = {}
    for name, schedule in (("both sides", Full()), ("one side", Causal()), ("surprise", Causal())):
        scores = scored(run, name, schedule, words)
        kept = torch.zeros_like(matter).scatter_(1, scores.argsort(1, descending=True)[:, :KEEP], True)
        whole = (kept & matter).unflatten(1, (-1, 4)).sum(-1) == 2
        figures[name] = whole.sum().item() / (len(words) * FACTS)
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """The prompt can hold all facts: eight words of the twelve that stay."""
    return [
        (
            f.above("both sides", "surprise", 0.1),
            f"facts that stay whole {f['both sides']:.3f} by the encoder, {f['surprise']:.3f} by a causal model's "
            "surprise",
        ),
        (f.above("both sides", "one side", 0.1), f"by a classifier that sees only what is before {f['one side']:.3f}"),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))

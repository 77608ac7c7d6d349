# SPDX-License-Identifier: Apache-2.0
"""Shen et al., "Positional Description Matters for Transformers Arithmetic" (arXiv 2311.14737).

The same additions written as one writes them, or padded and with the last digit first, with the positions of
`pycore.models.transformer`: a learned table, or one entered at random places.
"""

import torch
from paper import Figures, Paper, Run, main
from torch import Tensor

from pycore.models.bytelm import BytelmConfig
from pycore.models.transformer import Transformer

PAPER = Paper(
    32,
    "Positional Description Matters for Transformers Arithmetic",
    "how the positions of digits are described decides whether a small transformer learns to add: usual training"
    " fails where padded and reversed digits are learned; and usual positions do not extrapolate in length",
    "sums of numbers of 1 to 4 digits, a decoder of 2 blocks of width 64 for each way of writing, 1000 steps of 64;"
    " whole sums right, of 4 digits and of 5, which training has not seen",
)
DIGITS, LONGER, COUNT = 4, 5, 64
PLUS, EQUALS, END, VOCABULARY = 10, 11, 12, 13
ROWS = 24
SHAPE = BytelmConfig(layers=2, dim=64, heads=4, kv_heads=4, position="none")


def written(numbers: Tensor, width: int) -> Tensor:
    """Digits of numbers, the highest first: [n, width]."""
    return numbers[:, None] // 10 ** torch.arange(width - 1, -1, -1) % 10


def sums(run: Run, how: str, count: int, digits: int) -> tuple[Tensor, int]:
    """Tokens of additions of numbers of so many digits, and where the answer starts."""
    low = 10 ** (digits - 1) if digits > 1 else 0
    a, b = (run.integers(10**digits, count, low=low) for _ in range(2))
    width = LONGER if how != "plain" else digits  # padding makes all numbers as long
    parts = [written(a, width), written(b, width), written(a + b, width + 1)]
    if how != "plain":
        parts = [part.flip(1) for part in parts]

    def sign(token: int) -> Tensor:
        return torch.full((count, 1), token)

    tokens = torch.cat([parts[0], sign(PLUS), parts[1], sign(EQUALS), parts[2], sign(END)], 1)
    return tokens, 2 * width + 2


def places(run: Run, how: str, tokens: Tensor, training: bool) -> Tensor | None:
    """Rows of the table: from the first on, or in training from a random one."""
    if how != "reversed, shifted" or not training:
        return None
    first = run.integers(ROWS - tokens.shape[1] + 1, len(tokens), 1)
    return first + torch.arange(tokens.shape[1])


@torch.no_grad()
def accuracy(run: Run, how: str, net: Transformer, digits: int) -> float:
    """Sums whose every digit is right, given the right ones before: as greedy decoding, which stops at an error."""
    tokens, start = sums(run, how, run.pick(500, 20), digits)
    guess = net.logits(net(tokens[:, :-1])[:, start - 1 :]).argmax(-1)
    return (guess == tokens[:, start:]).all(1).double().mean().item()


def experiment(run: Run) -> dict[str, float]:
    """Both lengths, for each way."""
    figures: dict[str, float] = {}
    for how in ("plain", "reversed", "reversed, shifted"):
        torch.manual_seed(run.seed)
        net = Transformer(SHAPE, vocabulary=VOCABULARY, absolute=ROWS)

        def loss(step: int, how: str = how, net: Transformer = net) -> Tensor:
            tokens, start = sums(run, how, COUNT, int(run.integers(DIGITS + 1, low=1)))
            states = net(tokens[:, :-1], positions=places(run, how, tokens[:, :-1], True))
            return net.loss(states[:, start - 1 :], tokens[:, start:])

        run.fit(how, net, loss, 1000, learning_rate=4e-3)
        for digits in (DIGITS, LONGER):
            figures[f"{how}, {digits} digits"] = accuracy(run, how, net, digits)
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """The paper's tasks have more digits and more samples."""
    return [
        (
            f.above("reversed, 4 digits", "plain, 4 digits", 0.2),
            f"sums of 4 digits right: {f['reversed, 4 digits']:.2f} padded and reversed, {f['plain, 4 digits']:.2f} "
            "as usual",
        ),
        (
            max(f["plain, 5 digits"], f["reversed, 5 digits"]) < 0.1,
            f"of 5 digits, never seen: {f['plain, 5 digits']:.2f} as usual, {f['reversed, 5 digits']:.2f} reversed",
        ),
        (
            f["reversed, shifted, 5 digits"] > 0.1,
            f"reversed and at random places of the table, 5 digits: {f['reversed, shifted, 5 digits']:.2f}",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))

# SPDX-License-Identifier: Apache-2.0
"""Wang et al., "InSerter: Speech Instruction Following with Unsupervised Interleaved Pre-training".

A decoder is pretrained on text whose pieces are in part spoken (made-up frames), then taught in writing to follow an
instruction, and asked by voice.
"""

import torch
from paper import Figures, Paper, Run, main
from torch import Tensor, nn
from torch.nn import functional

from pycore import ops
from pycore.models.bytelm import BytelmConfig
from pycore.models.transformer import Transformer
from pycore.nn.linear import Projection

PAPER = Paper(
    11,
    "InSerter: Speech Instruction Following with Unsupervised Interleaved Pre-training",
    "pretraining on sequences in which speech and text of one passage take turns lets a model follow spoken"
    " instructions although it was taught with written ones; pretraining on whole passages of either kind does not",
    "passages of 24 words: 24 symbols with two successors each, and two words that say which of them follows; a word is"
    " spoken as a noisy frame of 8 numbers; pieces of 2 words; a decoder of 2 blocks of width 64; 700 steps, then 200"
    " on written tasks: one of the two words as an instruction and eight symbols, the answer is the first or the last",
)
SYMBOLS, LENGTH, CHANNELS, PIECE, COUNT = 24, 24, 8, 2, 32
FIRST, LAST, ANSWER, VOCABULARY = SYMBOLS, SYMBOLS + 1, SYMBOLS + 2, SYMBOLS + 3
SHAPE = BytelmConfig(layers=2, dim=64, heads=4, kv_heads=4, max_distance=64)


class World:
    """Which symbols follow each other, and what all tokens but ANSWER sound like."""

    def __init__(self, run: Run) -> None:
        self.run, self.sounds = run, run.normal(VOCABULARY, CHANNELS)
        self.next = run.uniform(SYMBOLS, SYMBOLS).argsort(1)[:, :2]

    def passages(self, count: int) -> Tensor:
        """int64 [count, LENGTH]; the instructions are words of the language, which say what follows the last symbol."""
        symbol = self.run.integers(SYMBOLS, count)
        rows, told = [symbol], torch.zeros(count, dtype=torch.bool)
        which = torch.zeros_like(symbol)
        for _ in range(LENGTH - 1):
            which = torch.where(told, which, self.run.integers(2, count))
            told = ~told & (self.run.uniform(count) < 0.2)  # here an instruction stands, and behind it the symbol
            symbol = torch.where(told, symbol, self.next[symbol, which])
            rows.append(torch.where(told, FIRST + which, symbol))
        return torch.stack(rows, 1)

    def frames(self, text: Tensor) -> Tensor:
        """Spoken: [..., CHANNELS]."""
        return self.sounds[text] + 0.3 * self.run.normal(*text.shape, CHANNELS)

    def tasks(self, count: int) -> tuple[Tensor, Tensor]:
        """An instruction, eight symbols, and ANSWER; and the answer."""
        symbols, which = self.run.integers(SYMBOLS, count, 8), self.run.integers(2, count, 1)
        text = torch.cat([FIRST + which, symbols, torch.full((count, 1), ANSWER)], 1)
        return text, torch.where(which[:, 0] == 0, symbols[:, 0], symbols[:, 7])


class Listener(nn.Module):
    """A decoder whose tokens are written or spoken."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.hear = Transformer(SHAPE, vocabulary=VOCABULARY), Projection(CHANNELS, 64, bias=True)

    def forward(self, text: Tensor, frames: Tensor, spoken: Tensor) -> Tensor:
        """States, where `spoken` [n, length] says which tokens are frames."""
        x = torch.where(spoken[..., None], self.hear(frames) * 0.1, self.decoder.embed(text))
        return self.decoder(x, embedded=True)


def pretraining(run: Run, world: World, model: Listener, interleaved: bool) -> Tensor:
    """The next token where it is written, the next frame where it is spoken."""
    text = world.passages(COUNT)
    frames = world.frames(text)
    pieces = run.integers(2, COUNT, LENGTH // PIECE if interleaved else 1)
    spoken = pieces.repeat_interleave(LENGTH // pieces.shape[1], 1) > 0
    states = model(text[:, :-1], frames[:, :-1], spoken[:, :-1])
    written = model.decoder.loss(states, text[:, 1:].masked_fill(spoken[:, 1:], -100))
    heard = functional.linear(states, model.hear.weight.T)  # the frames' own projection, backwards
    error = (heard - frames[:, 1:]).square().mean(-1)[spoken[:, 1:]].mean()
    return written + 0.5 * error


def experiment(run: Run) -> dict[str, float]:
    """Accuracy of answers to written and spoken tasks."""
    figures: dict[str, float] = {}
    for name in ("interleaved", "apart"):
        torch.manual_seed(run.seed)
        world, model = World(run), Listener()

        def loss(step: int, name: str = name, world: World = world, model: Listener = model) -> Tensor:
            return pretraining(run, world, model, name == "interleaved")

        def task(step: int, world: World = world, model: Listener = model) -> Tensor:
            text, answer = world.tasks(COUNT)
            states = model(text, world.frames(text), torch.zeros_like(text, dtype=torch.bool))
            return model.decoder.loss(states[:, -1], answer)

        run.fit(f"{name}, passages", model, loss, 700, learning_rate=3e-3)
        run.fit(f"{name}, tasks", model, task, 200, learning_rate=1e-3)
        text, answer = world.tasks(run.pick(1000, 40))
        for how in ("written", "spoken"):
            spoken = torch.full_like(text, how == "spoken", dtype=torch.bool)
            spoken[:, -1] = False
            with torch.no_grad():
                state = model(text, world.frames(text), spoken)[:, -1]
                guess = ops.pairwise_topk(state, model.decoder.embedding, 1)[1][:, 0]
            figures[f"{name}, {how}"] = (guess == answer).double().mean().item()
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """Chance is 1 in 24."""
    return [
        (
            f.above("interleaved, spoken", "apart, spoken", 0.1),
            f"answers to spoken tasks right: {f['interleaved, spoken']:.3f} after interleaved pretraining, "
            f"{f['apart, spoken']:.3f} after pretraining on whole passages",
        ),
        (
            f["interleaved, spoken"] > f["interleaved, written"] - 0.1,
            f"to written ones {f['interleaved, written']:.3f} and {f['apart, written']:.3f}",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))

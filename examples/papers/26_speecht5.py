# SPDX-License-Identifier: Apache-2.0
"""Ao et al., "SpeechT5: Unified-Modal Encoder-Decoder Pre-Training for Spoken Language Processing" (arXiv 2110.07205).

Speech (made-up frames) and text share an encoder and a decoder. States of either are replaced here and there by codes
of one `pycore.nn.GumbelVectorQuantizer`, which is to bring the two together.
"""

import torch
from paper import Figures, Paper, Run, main
from torch import Tensor, nn
from torch.nn import functional

from pycore.models.bytelm import BytelmConfig
from pycore.models.transformer import Transformer
from pycore.nn import GumbelVectorQuantizer
from pycore.nn.linear import Projection
from pycore.schedules import Full

PAPER = Paper(
    26,
    "SpeechT5: Unified-Modal Encoder-Decoder Pre-Training for Spoken Language Processing",
    "pretraining one encoder-decoder on speech and text without pairs helps to transcribe speech, and mixing in"
    " codes that both share helps more",
    "sentences of 10 symbols of 16 (each with three likely successors), a noisy frame of 8 numbers for each;"
    " encoder and decoder of a block of width 48; 500 steps on masked speech and text, 60 of finetuning on 200"
    " pairs; a tenth of the states replaced by 2 groups of 20 codes; symbols transcribed right",
)
SYMBOLS, LENGTH, CHANNELS, COUNT, PAIRS = 16, 10, 8, 32, 200
MASK = BEGIN = SYMBOLS
SHAPE = BytelmConfig(layers=1, dim=48, heads=4, kv_heads=4, max_distance=64)


class World:
    """What follows what, and what it sounds like."""

    def __init__(self, run: Run) -> None:
        self.run, self.sounds = run, run.normal(SYMBOLS, CHANNELS)
        self.next = run.uniform(SYMBOLS, SYMBOLS).argsort(1)[:, :3]

    def text(self, count: int) -> Tensor:
        """int64 [count, LENGTH]."""
        rows = [self.run.integers(SYMBOLS, count)]
        for _ in range(LENGTH - 1):
            rows.append(self.next[rows[-1], self.run.integers(3, count)])
        return torch.stack(rows, 1)

    def speech(self, text: Tensor) -> Tensor:
        """Frames [count, LENGTH, CHANNELS]."""
        return self.sounds[text] + 0.5 * self.run.normal(*text.shape, CHANNELS)


class Model(nn.Module):
    """Ways in for both, an encoder, a decoder of text, a way back to frames, and the codes."""

    def __init__(self, codes: bool) -> None:
        super().__init__()
        self.encoder = Transformer(SHAPE, vocabulary=SYMBOLS + 1)
        self.decoder = Transformer(SHAPE, vocabulary=SYMBOLS + 1, cross=True)
        self.hear, self.say = Projection(CHANNELS, 48, bias=True), Projection(48, CHANNELS, bias=True)
        temperature = (2.0, 0.5, 0.99)
        self.codes = GumbelVectorQuantizer(48, 20, temperature, 2, False, 48) if codes else None
        self.diversity = torch.zeros(())

    def read(self, run: Run, x: Tensor) -> Tensor:
        """The encoder's states of text or frames, a tenth of which are codes in training."""
        into = self.encoder.embed(x) if x.dtype == torch.int64 else self.hear(x) * 0.1
        states = self.encoder(into, schedule=Full(), embedded=True)
        if self.codes is None or not self.training:
            return states
        found = self.codes(states)
        self.diversity = 1 - found["prob_perplexity"] / found["num_vars"]
        return torch.where((run.uniform(*states.shape[:2]) < 0.1)[..., None], found["x"], states)

    def write(self, memory: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of the text, and the share of symbols that are right after the right ones."""
        tokens = torch.cat([torch.full((len(text), 1), BEGIN), text[:, :-1]], 1)
        states = self.decoder(tokens, memory=memory)
        guess = self.decoder.logits(states.detach()).argmax(-1)
        return self.decoder.loss(states, text), (guess == text).double().mean()


def pretraining(run: Run, world: World, model: Model) -> Tensor:
    """Text from masked text, frames from masked frames: other sentences."""
    text = world.text(COUNT)
    hidden = run.uniform(COUNT, LENGTH) < 0.3
    loss = model.write(model.read(run, text.masked_fill(hidden, MASK)), text)[0] + 0.1 * model.diversity
    frames = world.speech(world.text(COUNT))
    hidden = run.uniform(COUNT, LENGTH) < 0.3
    states = model.read(run, frames.masked_fill(hidden[..., None], 0.0))
    return loss + functional.mse_loss(model.say(states), frames) + 0.1 * model.diversity


def experiment(run: Run) -> dict[str, float]:
    """Symbols right, without pretraining, with it, and with codes mixed in; and how many codes are in use."""
    figures: dict[str, float] = {}
    world = World(run)
    pairs, test = world.text(PAIRS), world.text(run.pick(600, 30))
    heard, test_heard = world.speech(pairs), world.speech(test)
    for name in ("no pretraining", "pretraining", "codes mixed in"):
        torch.manual_seed(run.seed)
        model = Model(name == "codes mixed in")

        def loss(step: int, model: Model = model) -> Tensor:
            if model.codes is not None:
                model.codes.set_num_updates(step)
            return pretraining(run, world, model)

        def transcribe(step: int, model: Model = model) -> Tensor:
            chosen = run.integers(PAIRS, COUNT)
            return model.write(model.read(run, heard[chosen]), pairs[chosen])[0]

        if name != "no pretraining":
            run.fit(f"{name}, first", model, loss, 500)
        run.fit(name, model, transcribe, 60)
        model.eval()
        with torch.no_grad():
            states = model.read(run, test_heard)
            figures[name] = model.write(states, test)[1].item()
            if model.codes is not None:
                figures["codes in use"] = model.codes(states)["code_perplexity"].item()
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """The paper's ablation has the same three rows."""
    return [
        (
            f.above("pretraining", "no pretraining"),
            f"symbols right {f['pretraining']:.3f} after pretraining, {f['no pretraining']:.3f} without",
        ),
        (
            f.above("codes mixed in", "pretraining"),
            f"{f['codes mixed in']:.3f} with codes mixed in, of which {f['codes in use']:.0f} of 40 are in use",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))

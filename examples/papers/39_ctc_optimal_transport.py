# SPDX-License-Identifier: Apache-2.0
"""Le et al., "Pre-training for Speech Translation: CTC Meets Optimal Transport" (arXiv 2301.11716).

A translator from text is there. An encoder of what espeak-ng says learns to transcribe by CTC, alone or while the
optimal transport between its states and the text encoder's (`pycore.ops.sinkhorn`) is made cheap.
"""

import torch
from paper import Figures, Paper, Run, main
from speech import CHANNELS, LENGTH, WORDS, spoken
from torch import Tensor, nn
from torch.nn import functional

from pycore import ops
from pycore.models.bytelm import BytelmConfig
from pycore.models.transformer import Transformer
from pycore.schedules import Full

PAPER = Paper(
    39,
    "Pre-training for Speech Translation: CTC Meets Optimal Transport",
    "CTC with optimal transport to a text encoder brings speech nearer to text than CTC alone, and the speech"
    " translation that is finetuned from it is better",
    "sentences of 5 words of 12, of which espeak-ng reads 1,200 in four voices; 25 frames a second of 24 mel bands;"
    " translated backwards with every word renamed; encoders and decoder of a block of width 48; 60 steps of"
    " finetuning; words right in 300 other spoken sentences",
)
BLANK = BOS = len(WORDS)
SHAPE = BytelmConfig(layers=1, dim=48, heads=4, kv_heads=4, position="rope", max_distance=128)


class World:
    """What words are called in the other language, and which sentences are heard in training."""

    def __init__(self, run: Run) -> None:
        self.run, self.names = run, run.permutation(len(WORDS))
        self.frames, self.lengths, self.text = spoken(run.quick)
        order = run.permutation(len(self.text))
        self.train, self.test = order[len(order) // 5 :], order[: len(order) // 5]

    def heard(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Frames [rows, longest, CHANNELS], how many count, sentences [rows, LENGTH], translations."""
        text = self.text[rows]
        return self.frames[rows], self.lengths[rows], text, self.names[text.flip(1)]

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """32 sentences of training."""
        return self.heard(self.train[self.run.integers(len(self.train), 32)])

    def written(self) -> tuple[Tensor, Tensor]:
        """32 sentences that nobody has to say, and translations."""
        text = self.run.integers(len(WORDS), 32, LENGTH)
        return text, self.names[text.flip(1)]


def translation(decoder: Transformer, memory: Tensor, lengths: Tensor | None, target: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the share of words that are right after the right ones."""
    tokens = torch.cat([torch.full((len(target), 1), BOS), target[:, :-1]], 1)
    states = decoder(tokens, memory=memory, memory_lengths=lengths)
    right = (decoder.logits(states.detach()).argmax(-1) == target).double().mean()
    return decoder.loss(states, target), right


def gap(speech: Tensor, lengths: Tensor, text: Tensor) -> Tensor:
    """Cost of moving speech's states of each sentence to text's: every frame that counts weighs the same."""
    counts = torch.arange(speech.shape[1]) < lengths[:, None]
    weights = counts.float() / lengths[:, None]
    return ops.sinkhorn(speech, text, epsilon=0.5, iterations=8, a=weights)[0].mean()


def listen(run: Run, world: World, reader: Transformer, transport: bool) -> Transformer:
    """A speech encoder that has learned to transcribe, and perhaps to be where the text encoder is."""
    encoder = Transformer(SHAPE, inputs=CHANNELS)
    words = nn.Parameter(torch.randn(len(WORDS) + 1, SHAPE.dim) * 0.1)

    def loss(step: int) -> Tensor:
        frames, lengths, text, _ = world.batch()
        states = encoder(frames, schedule=Full(), lengths=lengths)
        scores = ops.invariant_linear(states, words).log_softmax(-1).transpose(0, 1)
        sizes = torch.full((32,), LENGTH)
        total = functional.ctc_loss(scores, text, lengths, sizes, blank=BLANK, zero_infinity=True)
        if transport:
            with torch.no_grad():
                wanted = reader(text, schedule=Full())
            total = total + 0.05 * gap(states, lengths, wanted)
        return total

    run.fit("CTC and transport" if transport else "CTC", [*encoder.parameters(), words], loss, 300)
    return encoder


def experiment(run: Run) -> dict[str, float]:
    """Three speech encoders in front of the same translator, before and after finetuning."""
    world = World(run)
    reader = Transformer(SHAPE, vocabulary=len(WORDS))
    decoder = Transformer(SHAPE, vocabulary=len(WORDS) + 1, cross=True)

    def text_loss(step: int) -> Tensor:
        text, target = world.written()
        return translation(decoder, reader(text, schedule=Full()), None, target)[0]

    run.fit("text", [*reader.parameters(), *decoder.parameters()], text_loss, 400)
    first = {name: value.clone() for name, value in decoder.state_dict().items()}
    frames, lengths, text, target = world.heard(world.test)
    figures: dict[str, float] = {}
    with torch.no_grad():
        figures["text, right"] = translation(decoder, reader(text, schedule=Full()), None, target)[1].item()
    for name in ("scratch", "CTC", "CTC and OT"):
        encoder = Transformer(SHAPE, inputs=CHANNELS) if name == "scratch" else listen(run, world, reader, "OT" in name)
        decoder.load_state_dict(first)

        def speech_loss(step: int, encoder: Transformer = encoder) -> Tensor:
            heard, sizes, _, wanted = world.batch()
            return translation(decoder, encoder(heard, schedule=Full(), lengths=sizes), sizes, wanted)[0]

        for when in ("at once", "finetuned"):
            if when == "finetuned":
                run.fit(f"{name}, finetuning", [*encoder.parameters(), *decoder.parameters()], speech_loss, 60)
            with torch.no_grad():
                states = encoder(frames, schedule=Full(), lengths=lengths)
                figures[f"{name}, {when}"] = translation(decoder, states, lengths, target)[1].item()
                if when == "at once":
                    figures[f"{name}, gap"] = gap(states, lengths, reader(text, schedule=Full())).item()
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """The gap is the transport's cost between speech and text of the same sentence."""
    return [
        (
            f.above("CTC, gap", "CTC and OT, gap"),
            f"the gap to text is {f['CTC and OT, gap']:.1f} with transport, {f['CTC, gap']:.1f} by CTC alone, "
            f"{f['scratch, gap']:.1f} untrained",
        ),
        (
            f.above("CTC and OT, finetuned", "CTC, finetuned"),
            f"words translated right after finetuning {f['CTC and OT, finetuned']:.2f} with transport, "
            f"{f['CTC, finetuned']:.2f} by CTC alone, {f['scratch, finetuned']:.2f} from scratch",
        ),
        (
            f.above("CTC and OT, at once", "CTC, at once"),
            f"without any finetuning {f['CTC and OT, at once']:.2f}, {f['CTC, at once']:.2f} and "
            f"{f['scratch, at once']:.2f}",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))

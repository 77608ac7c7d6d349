# SPDX-License-Identifier: Apache-2.0
"""Pan et al., "LLMLingua-2: Data Distillation for Efficient and Faithful Task-Agnostic Prompt Compression"
(arXiv 2403.12968).

Which words of a prompt may go? An encoder that sees both sides (`pycore.schedules.Full`) is taught by examples; the
rule it is to beat keeps the words that surprise a causal model. What is left is read by SmolLM2-135M
(`pycore.models.llama`), who is asked for the facts of the prompt.
"""

import functools
from collections.abc import Callable

import torch
from paper import Figures, Paper, Run, UserError, main
from smollm2 import FOLDER, missing, present
from torch import Tensor, nn

from pycore import ops
from pycore.models.bytelm import BytelmConfig
from pycore.models.llama import load_llama
from pycore.models.transformer import Transformer
from pycore.schedules import Full

PAPER = Paper(
    10,
    "LLMLingua-2: Data Distillation for Efficient and Faithful Task-Agnostic Prompt Compression",
    "deciding word by word with an encoder that sees both sides keeps what matters; the entropy of a causal model is"
    " not aligned with that",
    "made-up prompts of 8 sentences: 3 facts (the code of a thing) among 5 that look alike and matter to nobody;"
    " SmolLM2-135M reads what is kept and goes on with a sentence that asks for a code; an encoder of one block of"
    " width 48 taught 150 steps; surprise is SmolLM2's own; 24 prompts a seed; codes right",
)
COLORS = "red blue green white black yellow old new broken little".split()
THINGS = "door box key lamp boat house book wheel clock chair table bridge".split()
FACTS, SENTENCES, SHARES = 3, 8, (0.5, 0.35)
SHAPE = BytelmConfig(layers=1, dim=48, heads=4, kv_heads=4, max_distance=1024)
KNOWN = {word: i + 2 for i, word in enumerate([*COLORS, *THINGS])}
Reader = tuple[Callable[[Tensor], Tensor], Callable[[str], list[int]]]


def prompt(run: Run) -> tuple[list[str], list[bool], str, str]:
    """Words, which of them matter, the beginning of a sentence that asks, and the code that answers."""
    words, matter, question, answer = list[str](), list[bool](), "", ""
    order, colors, things = run.permutation(SENTENCES), run.permutation(len(COLORS)), run.permutation(len(THINGS))
    asked = int(run.integers(FACTS, 1))
    for kind in order.tolist():
        color, thing = COLORS[int(colors[kind])], THINGS[int(things[kind])]
        number = str(int(run.integers(900, 1)) + 100)
        if kind < FACTS:
            sentence = f"The code of the {color} {thing} is {number}."
            if kind == asked:
                question, answer = f"The code of the {color} {thing} is", f" {number}"
        else:
            sentence = f"There were {number} people who saw the {color} {thing}."
        words += sentence.split()
        matter += [kind < FACTS and (word in KNOWN or word == "code" or word[0].isdigit()) for word in sentence.split()]
    return words, matter, question, answer


def numbered(words: list[str]) -> list[int]:
    """A word's number for the encoder: those of colours and things, 0 for any code, others by their length."""
    plain = [word.rstrip(".") for word in words]
    return [0 if word.isdigit() else KNOWN.get(word, len(KNOWN) + 2 + len(word)) for word in plain]


@functools.cache
def reader(quick: bool) -> Reader:
    """States to log-probabilities of SmolLM2, or of a small random model, and the tokens of a text."""
    if quick:
        torch.manual_seed(0)
        small = Transformer(SHAPE, vocabulary=256)
        return lambda ids: small.logits(small(ids[None]))[0], lambda text: list(text.encode())
    if not present():
        raise UserError(missing())
    from tokenizers import Tokenizer

    model, tokenizer = load_llama(FOLDER), Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    return lambda ids: model(ids[None], model.state())[0], lambda text: tokenizer.encode(text).ids


@torch.no_grad()
def surprise(read: Reader, words: list[str]) -> list[float]:
    """Of each word, that of its tokens together; the first is not known."""
    logits, encode = read
    parts = [encode((" " if i else "") + word) for i, word in enumerate(words)]
    ids = torch.tensor([token for part in parts for token in part])
    each = -logits(ids)[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    place = torch.tensor([i for i, part in enumerate(parts) for _ in part])[1:]
    return torch.zeros(len(words)).index_add_(0, place, each).tolist()


@torch.no_grad()
def right(read: Reader, words: list[str], question: str, answer: str) -> bool:
    """Whether every token of the answer is the most likely behind the words and the question."""
    logits, encode = read
    before, wanted = encode(" ".join(words) + "\n" + question), encode(answer)
    guess = logits(torch.tensor(before + wanted))[len(before) - 1 : -1].argmax(-1)
    return guess.tolist() == wanted


def taught(run: Run) -> Callable[[list[str]], list[float]]:
    """An encoder that says how much it wants each word to stay."""
    model, classes = Transformer(SHAPE, vocabulary=len(KNOWN) + 16), nn.Parameter(torch.zeros(2, SHAPE.dim))

    def loss(step: int) -> Tensor:
        drawn = [prompt(run)[:2] for _ in range(16)]
        lengths = torch.tensor([len(words) for words, _ in drawn])
        longest = int(lengths.max())
        tokens = torch.tensor([numbered(words) + [1] * (longest - len(words)) for words, _ in drawn])
        target = torch.tensor([[*map(int, matter)] + [-100] * (longest - len(matter)) for _, matter in drawn])
        return ops.linear_cross_entropy(model(tokens, schedule=Full(), lengths=lengths), classes, target)

    run.fit("encoder", [*model.parameters(), classes], loss, 150, learning_rate=3e-3)

    @torch.no_grad()
    def scores(words: list[str]) -> list[float]:
        both = ops.invariant_linear(model(torch.tensor([numbered(words)]), schedule=Full()), classes)[0]
        return (both[:, 1] - both[:, 0]).tolist()

    return scores


def experiment(run: Run) -> dict[str, float]:
    """The share of codes that are right, from whole prompts and from what each rule keeps."""
    read, scores = reader(run.quick), taught(run)
    hits: dict[str, list[bool]] = {}
    for words, _, question, answer in [prompt(run) for _ in range(run.pick(24, 2))]:
        hits.setdefault("whole", []).append(right(read, words, question, answer))
        rules = {
            "encoder": scores(words),
            "surprise": surprise(read, words),
            "random": run.uniform(len(words)).tolist(),
        }
        for name, values in rules.items():
            order = sorted(range(len(words)), key=lambda i, values=values: -values[i])
            for share in SHARES:
                kept = sorted(order[: round(share * len(words))])
                answered = right(read, [words[i] for i in kept], question, answer)
                hits.setdefault(f"{name}, {share:.0%} kept", []).append(answered)
    return {name: sum(found) / len(found) for name, found in hits.items()}


def checks(f: Figures) -> list[tuple[bool, str]]:
    """By share of the words that stay."""
    found = []
    for share in (f"{share:.0%}" for share in SHARES):
        names = [f"{rule}, {share} kept" for rule in ("encoder", "surprise", "random")]
        text = "codes right with {} of the words: {:.2f} chosen by the encoder, {:.2f} by surprise, {:.2f} at random"
        found.append((f.above(*names[:2]), text.format(share, *(f[name] for name in names))))
    text = f"half the words, chosen by the encoder, give up to a tenth less than the whole prompt: {f['whole']:.2f}"
    return [*found, (f["encoder, 50% kept"] > 0.9 * f["whole"], text)]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))

# SPDX-License-Identifier: Apache-2.0
"""Tamkin et al., "Codebook Features: Sparse and Discrete Interpretability for Neural Networks" (arXiv 2310.17230).

A trained byte model is finetuned with `pycore.nn.CodebookFeatures` behind each of its blocks. Then codes that are
active before a newline are forced, to see whether newlines follow.
"""

import copy

import torch
from bytes_text import bits, model, windows
from paper import Figures, Paper, Run, main
from torch import Tensor, nn

from pycore.models.transformer import Transformer
from pycore.nn import CodebookFeatures

PAPER = Paper(
    21,
    "Codebook Features: Sparse and Discrete Interpretability for Neural Networks",
    "a network whose hidden states are few discrete codes loses only a little, and activating the codes that go with a"
    " behaviour elicits it",
    "a byte model of 2 blocks of width 64 on the standard library's sources, 500 steps, then 250 with 8 of 512 codes"
    " (or 1) behind each block; bits per byte of held-out text; the behaviour is to end the line",
)
CODES, LENGTH, COUNT, NEWLINE = 512, 64, 16, 10


class Coded(nn.Module):
    """A byte model whose blocks' outputs are codes; with none, it is as it was."""

    def __init__(self, net: Transformer, k: int) -> None:
        super().__init__()
        self.net = net
        self.books = nn.ModuleList(CodebookFeatures(64, CODES, k=k) for _ in net.blocks if k)
        self.extra = torch.zeros(())
        for block, book in zip(net.blocks, self.books, strict=False):
            block.register_forward_hook(lambda _, __, out, book=book: self.coded(book, out))

    def coded(self, book: CodebookFeatures, states: Tensor) -> Tensor:
        """The states' codes, whose loss is kept."""
        out, _, loss = book(states)
        self.extra = self.extra + loss
        return out

    def loss(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Of the next bytes; and of the codes."""
        self.extra = torch.zeros(())
        return self.net.loss(self.net(text[:, :-1]), text[:, 1:]), self.extra

    def newline(self, text: Tensor) -> Tensor:
        """The probability that a byte is followed by the end of the line."""
        return self.net.logits(self.net(text[:, :-1])).softmax(-1)[..., NEWLINE]


@torch.no_grad()
def newline_codes(model: Coded, text: Tensor, count: int) -> list[int]:
    """Codes of the last block that are much more frequent before a newline than elsewhere."""
    states: list[Tensor] = []
    book = model.books[-1]
    watch = book.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    model.loss(text)
    watch.remove()
    codes = book.encode(states[0])[..., 0, :]  # [n, length, k]
    ends = text[:, 1:] == NEWLINE
    before = torch.bincount(codes[ends].flatten(), minlength=CODES) / max(int(ends.sum()), 1)
    elsewhere = torch.bincount(codes[~ends].flatten(), minlength=CODES) / int((~ends).sum())
    return (before - elsewhere).argsort(descending=True)[:count].tolist()


def experiment(run: Run) -> dict[str, float]:
    """Bits per byte without codes, with 8 and with 1; and newlines, forced and not."""
    base = model()
    held_out = windows(run, run.pick(256, 16), LENGTH, held_out=True)
    run.fit("text", base, lambda step: Coded(base, 0).loss(windows(run, COUNT, LENGTH))[0], 500, learning_rate=4e-3)
    figures: dict[str, float] = {}
    for k in (0, 8, 1):
        coded = Coded(copy.deepcopy(base), k)
        if k:
            with torch.no_grad():
                figures[f"{k} codes, not finetuned"] = bits(coded.loss(held_out)[0])

        def loss(step: int, coded: Coded = coded) -> Tensor:
            return sum(coded.loss(windows(run, COUNT, LENGTH)))

        run.fit(f"{k} codes", coded, loss, 250)
        with torch.no_grad():
            figures[f"{k} codes"] = bits(coded.loss(held_out)[0])
        if k == 8:
            with torch.no_grad():
                figures["newline"] = coded.newline(held_out).mean().item()
            coded.books[-1].force(newline_codes(coded, windows(run, COUNT * 8, LENGTH), 4))
            with torch.no_grad():
                figures["newline, forced"] = coded.newline(held_out).mean().item()
            coded.books[-1].reset()
            coded.books[-1].force(run.permutation(CODES)[:4].tolist())
            with torch.no_grad():
                figures["newline, others forced"] = coded.newline(held_out).mean().item()
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """The paper's models lose little with 8 and with 100 codes; this one is smaller than its codebooks."""
    return [
        (
            f["8 codes"] < 1.1 * f["0 codes"] and f.above("8 codes, not finetuned", "8 codes"),
            f"bits per byte {f['8 codes']:.2f} with 8 codes, {f['1 codes']:.2f} with one, {f['0 codes']:.2f} without; "
            f"before finetuning {f['8 codes, not finetuned']:.2f}",
        ),
        (
            f.above("newline, forced", "newline") and f["newline, forced"] > 3 * f["newline, others forced"],
            f"probability of a newline {f['newline']:.3f}, {f['newline, forced']:.3f} with four of its codes forced, "
            f"{f['newline, others forced']:.3f} with four others",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))

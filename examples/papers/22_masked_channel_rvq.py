# SPDX-License-Identifier: Apache-2.0
"""Ji et al., "Language-Codec: Reducing the Gaps Between Discrete Codec Representation and Speech Language Models"
(arXiv 2402.12208).

Frames of synthetic vowels through `pycore.nn.MaskedChannelRVQ` and `pycore.nn.ResidualVQ` of the same size.
"""

import torch
from paper import Figures, Paper, Run, main
from torch import Tensor

from pycore.nn import MaskedChannelRVQ, ResidualVQ

PAPER = Paper(
    22,
    "Language-Codec: Reducing the Gaps Between Discrete Codec Representation and Speech Language Models",
    "quantizing bands of the channels first, side by side, makes the first codebook carry less of the signal, which is"
    " then easier for a language model, and costs the codec nothing",
    "log spectra of 48 bands of synthetic vowels with three formants; 8 stages of 64 codes, learned on 4000 frames",
)
BANDS, STAGES, CODES = 48, 8, 64


def frames(run: Run, count: int) -> Tensor:
    """Log spectra [count, BANDS]: three formants of random place, width and strength on a falling slope, and noise."""
    band = torch.arange(BANDS) / BANDS
    centre = torch.tensor([0.12, 0.35, 0.65]) + 0.09 * run.normal(count, 3)
    width = 0.03 + 0.04 * run.uniform(count, 3)
    strength = 1.0 + 0.5 * run.normal(count, 3)
    hills = (strength[..., None] * torch.exp(-(((band - centre[..., None]) / width[..., None]) ** 2))).sum(1)
    return hills - run.uniform(count, 1) * band + 0.5 * run.normal(count, 1) + 0.05 * run.normal(count, BANDS)


def decibels(signal: Tensor, decoded: Tensor) -> float:
    """Signal to noise, around the mean frame."""
    return (10 * torch.log10((signal - signal.mean(0)).square().sum() / (signal - decoded).square().sum())).item()


def experiment(run: Run) -> dict[str, float]:
    """Both quantizers: the first share of the variance, and signal to noise of all stages."""
    train, test = frames(run, run.pick(4000, 300)), frames(run, 1000)
    figures: dict[str, float] = {}
    options = {"dim": BANDS, "num_quantizers": STAGES, "codebook_size": CODES, "kmeans_init": True, "decay": 0.9}
    for name, quantizer in (
        ("masked", MaskedChannelRVQ(**options, threshold_ema_dead_code=1)),
        ("plain", ResidualVQ(**options, threshold_ema_dead_code=1)),
    ):
        for _ in range(run.pick(40, 2)):
            quantizer(train[None])
        quantizer.eval()
        with torch.no_grad():
            decoded, codes, _ = quantizer(test[None])
            same = bool((quantizer.encode(test[None]) == codes).all())
            first = quantizer.decode(codes[..., :1])[0]
        variance = (test - test.mean(0)).square().sum()
        figures[f"{name}, first share"] = 1 - ((test - first).square().sum() / variance).item()
        figures[f"{name}, decibels"] = decibels(test, decoded[0])
        used = torch.stack([stage.bincount(minlength=CODES) for stage in codes[0].T]).double() / len(test)
        figures[f"{name}, codes in use"] = (-(used * (used + 1e-12).log()).sum(1)).exp().mean().item()
        figures[f"{name}, encode is forward"] = float(same)
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """The authors' code encodes without the masks that it was trained with; here both give the same codes."""
    return [
        (
            f.above("plain, first share", "masked, first share", 0.1),
            f"the first codebook explains {f['masked, first share']:.0%} of the variance, "
            f"{f['plain, first share']:.0%} in a plain residual quantizer",
        ),
        (
            f["masked, decibels"] > f["plain, decibels"] - 0.5,
            f"signal to noise {f['masked, decibels']:.1f} dB, plain {f['plain, decibels']:.1f} dB",
        ),
        (f["masked, encode is forward"] == 1, "encode gives the codes of forward"),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))

# SPDX-License-Identifier: Apache-2.0
"""Jacobellis et al., "Machine Perceptual Quality: Evaluating the Impact of Severe Lossy Compression on Audio and Image
Models" (arXiv 2401.07957).

Images as the codes of a residual quantizer (`pycore.nn.ResidualVQ`), written as bytes by the arithmetic coder
(`pycore.ops.ac_encode`), and what a classifier makes of what is decoded.
"""

import torch
from paper import Figures, Paper, Run, main, split_digits
from torch import Tensor

from pycore import ops
from pycore.nn import ResidualVQ

PAPER = Paper(
    40,
    "Machine Perceptual Quality: Evaluating the Impact of Severe Lossy Compression on Audio and Image Models",
    "learned compression can be severe while what machines see in the images hardly suffers",
    "scikit-learn's digits; 1 to 6 stages of 64 codes learned on 1200 images, searched with a beam of 4, coded"
    " arithmetically; 5 nearest neighbours among the originals say what a decoded image is;"
    " against pixels rounded to fewer levels, coded too",
)
STAGES, CODES = 6, 64


def coded_bytes(symbols: Tensor, learned_from: Tensor, size: int) -> float:
    """Bytes an image of a stream that holds all: symbols [images, n], a distribution for each column."""
    counts = torch.ones(symbols.shape[1], size)
    columns = torch.arange(symbols.shape[1]).expand_as(learned_from)
    counts.index_put_((columns, learned_from), torch.ones(learned_from.shape), accumulate=True)
    cdf = ops.quantize_cdf(counts / counts.sum(1, keepdim=True))
    streams = ops.ac_encode(symbols.reshape(1, -1), cdf.repeat(len(symbols), 1)[None])
    return streams.nbytes / len(symbols)


def seen(images: Tensor, originals: Tensor, labels: Tensor, wanted: Tensor) -> float:
    """Accuracy of the five nearest neighbours."""
    nearest = labels[ops.pairwise_topk(images, originals, 5, score="euclidean")[1]]
    return (nearest.mode(1).values == wanted).double().mean().item()


def experiment(run: Run) -> dict[str, float]:
    """Bytes an image, error and accuracy, at every number of stages and for rounded pixels."""
    x, labels, test, test_labels = split_digits(run)
    quantizer = ResidualVQ(dim=64, num_quantizers=STAGES, codebook_size=CODES, kmeans_init=True, decay=0.9, beam_size=4)
    for _ in range(run.pick(40, 2)):
        quantizer(x[None])
    quantizer.eval()
    codes, learned_from = quantizer.encode(test[None])[0], quantizer.encode(x[None])[0]
    figures = {"originals, accuracy": seen(test, x, labels, test_labels)}
    for stages in range(1, STAGES + 1):
        decoded = quantizer.decode(codes[None, :, :stages])[0].detach()
        figures[f"{stages} stages, bytes"] = coded_bytes(codes[:, :stages], learned_from[:, :stages], CODES)
        figures[f"{stages} stages, error"] = (decoded - test).square().mean().item()
        figures[f"{stages} stages, accuracy"] = seen(decoded, x, labels, test_labels)
    for levels in (2, 3, 5, 17):
        rounded, learned = ((images * (levels - 1)).round().long() for images in (test, x))
        figures[f"{levels} levels, bytes"] = coded_bytes(rounded, learned, levels)
        figures[f"{levels} levels, accuracy"] = seen(rounded / (levels - 1), x, labels, test_labels)
    return figures


def checks(f: Figures) -> list[tuple[bool, str]]:
    """17 levels are the originals, without loss."""
    wanted = f["originals, accuracy"] - 0.02
    enough = [n for n in range(1, STAGES + 1) if f[f"{n} stages, accuracy"] > wanted]
    n = enough[0] if enough else STAGES  # the fewest that lose less than two hundredths
    best, fewest = f["6 stages, accuracy"], f["6 stages, bytes"]
    return [
        (
            bool(enough) and f["17 levels, bytes"] > 5 * f[f"{n} stages, bytes"],
            f"accuracy {f[f'{n} stages, accuracy']:.3f} at {f[f'{n} stages, bytes']:.1f} bytes an image, "
            f"{f['originals, accuracy']:.3f} for the originals at {f['17 levels, bytes']:.1f}",
        ),
        (
            best > f["2 levels, accuracy"] and fewest < f["2 levels, bytes"],
            f"six stages: {best:.3f} at {fewest:.1f} bytes; pixels of two levels {f['2 levels, accuracy']:.3f} at "
            f"{f['2 levels, bytes']:.1f}",
        ),
    ]


if __name__ == "__main__":
    raise SystemExit(main(PAPER, __file__, experiment, checks))

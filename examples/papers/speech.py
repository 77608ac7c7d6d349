# SPDX-License-Identifier: Apache-2.0
"""Short sentences of a few words, read by espeak-ng, as logarithms of the power in mel bands.

apt-get install espeak-ng
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
from paper import UserError
from torch import Tensor, nn
from torch.nn import functional

from pycore import ops
from pycore.models.codec_audio import espeak, has_espeak, synthetic_vowels

WORDS = "red seven window apple music four orange sugar city never winter yellow".split()
VOICES = (("en-us", 40), ("en-gb", 55), ("en-gb-scotland", 30), ("en-us+f2", 60))
LENGTH, RATE, HOP, WINDOW, CHANNELS = 5, 22050, 882, 1024, 24


def mel(frequency: Tensor) -> Tensor:
    """How high a frequency sounds."""
    return 2595 * torch.log10(1 + frequency / 700)


def frames_of(sound: Tensor) -> Tensor:
    """Logarithms of the power in bands: [frames, CHANNELS]."""
    windows = functional.pad(sound, (0, WINDOW)).unfold(0, WINDOW, HOP) * torch.hann_window(WINDOW)
    power = torch.fft.rfft(windows).abs().square()
    places = mel(torch.arange(WINDOW // 2 + 1) * (RATE / WINDOW))
    ends = torch.linspace(mel(torch.tensor(80.0)).item(), mel(torch.tensor(8000.0)).item(), CHANNELS + 2)
    bands = (1 - (places - ends[1:-1, None]).abs() / (ends[1] - ends[0])).clamp(min=0)
    return (ops.invariant_linear(power, bands) + 1e-3).log()


@functools.cache
def spoken(quick: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Frames [sentences, longest, CHANNELS], how many count, and the sentences [sentences, LENGTH], no two the same."""
    if not has_espeak() and not quick:
        raise UserError("espeak-ng is not here and has to read the sentences; apt-get install espeak-ng")
    chosen = torch.randperm(len(WORDS) ** LENGTH, generator=torch.Generator().manual_seed(0))[: 60 if quick else 1500]
    text = chosen[:, None] // len(WORDS) ** torch.arange(LENGTH) % len(WORDS)

    def say(row: int) -> Tensor:
        if not has_espeak():  # where it is quick: the figures mean nothing
            return frames_of(synthetic_vowels(1.5, sample_rate=RATE, seed=row))
        voice, pitch = VOICES[row % len(VOICES)]
        sentence = " ".join(WORDS[word] for word in text[row].tolist())
        return frames_of(espeak(sentence, voice=voice, pitch=pitch, speed=210, sample_rate=RATE))

    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(say, range(len(text))))
    heard = torch.cat(rows)
    rows = [(row - heard.mean(0)) / heard.std(0) for row in rows]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows]), text

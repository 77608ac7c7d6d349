# SPDX-License-Identifier: Apache-2.0
"""Sound to try a codec on, without the network: speech of espeak-ng where it is installed, synthetic vowels anywhere.

Waveforms are float32 [samples], -1 to 1. Everything here is element-wise or an FFT; nothing of it is part of a codec.
"""

from __future__ import annotations

import io
import math
import shutil
import subprocess
import wave
from pathlib import Path

import torch
from torch import Tensor

from pycore._checks import check_int
from pycore._tensors import check_tensor

__all__ = ["espeak", "has_espeak", "read_wav", "resample", "synthetic_vowels", "write_wav"]

# The first three formants of ten English vowels, in hertz (Peterson and Barney, 1952, men).
FORMANTS = (
    (270, 2290, 3010), (390, 1990, 2550), (530, 1840, 2480), (660, 1720, 2410), (730, 1090, 2440), (570, 840, 2410),
    (440, 1020, 2240), (300, 870, 2240), (640, 1190, 2390), (490, 1350, 1690),
)  # fmt: skip
BANDWIDTHS = (60.0, 90.0, 150.0)


def synthetic_vowels(seconds: float, *, sample_rate: int = 16000, seed: int = 0) -> Tensor:
    """A voice that glides from vowel to vowel, with pauses: harmonics of its pitch, as loud as the formants let them.

    Args:
        seconds: how long.
        sample_rate: samples a second.
        seed: of the vowels, the pitch, the lengths and the pauses.
    """
    check_int("synthetic_vowels", "sample_rate", sample_rate, 8000)
    if not 0 < seconds < math.inf:
        raise ValueError(f"synthetic_vowels: seconds is {seconds} and must be positive and finite")
    generator = torch.Generator().manual_seed(seed)
    count, per_vowel = int(seconds * sample_rate), sample_rate // 5
    knots = count // per_vowel + 2
    drawn = torch.tensor(FORMANTS, dtype=torch.float64)[torch.randint(len(FORMANTS), (knots,), generator=generator)]
    pitch = 90 + 90 * torch.rand(knots, generator=generator, dtype=torch.float64)
    loud = 0.3 + 0.7 * torch.rand(knots, generator=generator, dtype=torch.float64)
    loud[torch.rand(knots, generator=generator) < 0.15] = 0.0
    place = torch.arange(count, dtype=torch.float64) / per_vowel
    left, weight = place.long(), (place - place.floor()).mul(math.pi).cos().mul(-0.5).add(0.5)

    def glide(at_knots: Tensor) -> Tensor:
        return torch.lerp(at_knots[left], at_knots[left + 1], weight)

    f0, formants = glide(pitch), [glide(drawn[:, i]) for i in range(3)]
    phase = 2 * math.pi * torch.cumsum(f0 / sample_rate, 0)
    sound = torch.zeros(count, dtype=torch.float64)
    for harmonic in range(1, int(sample_rate / 2 / 90)):
        frequency = harmonic * f0
        resonance = sum(
            1 / (1 + ((frequency - formant) / bandwidth) ** 2)
            for formant, bandwidth in zip(formants, BANDWIDTHS, strict=True)
        )
        amplitude = torch.where(frequency < 0.45 * sample_rate, (resonance + 0.01) / harmonic**0.5, 0.0)
        sound += amplitude * torch.sin(harmonic * phase)
    sound *= glide(loud)
    return (0.5 * sound / sound.abs().max().clamp(min=1e-9)).float()


def has_espeak() -> bool:
    """Whether the program espeak-ng is there."""
    return shutil.which("espeak-ng") is not None


def espeak(text: str, *, voice: str = "en", pitch: int = 50, speed: int = 175, sample_rate: int = 16000) -> Tensor:
    """Text read by the program espeak-ng.

    Raises:
        RuntimeError: there is no espeak-ng, or it does not know the voice.
    """
    if not has_espeak():
        raise RuntimeError("espeak: the program espeak-ng is not installed and must be")
    command = ["espeak-ng", "-v", voice, "-p", str(pitch), "-s", str(speed), "--stdin", "--stdout"]
    done = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
    if done.returncode != 0 or not done.stdout:
        raise RuntimeError(f"espeak: {done.stderr.decode(errors='replace').strip() or 'espeak-ng gave no sound'}")
    # A WAV written to a pipe says it is as long as can be.
    at = done.stdout.index(b"data") + 8
    samples = _from_pcm(done.stdout[at:])
    return resample(samples, int.from_bytes(done.stdout[24:28], "little"), sample_rate)


def resample(waveform: Tensor, old_rate: int, new_rate: int) -> Tensor:
    """The waveform [n] with its spectrum cut off or padded, as an FFT of all of it does."""
    check_tensor("resample", "waveform", waveform)
    if old_rate == new_rate or not waveform.numel():
        return waveform
    length = round(waveform.numel() * new_rate / old_rate)
    spectrum = torch.fft.rfft(waveform.double())[: length // 2 + 1]
    return (torch.fft.irfft(spectrum, length) * (length / waveform.numel())).float()


def read_wav(path: str | Path) -> tuple[Tensor, int]:
    """Samples [n] of a WAV file of 16 bits, channels averaged, and samples a second.

    Raises:
        ValueError: another kind of file.
    """
    data = Path(path).read_bytes()
    try:
        with wave.open(io.BytesIO(data)) as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"read_wav: {path} is no WAV file that can be read: {error}") from None
    if width != 2:
        raise ValueError(f"read_wav: {path} has samples of {8 * width} bits and must have 16")
    return _from_pcm(raw[: len(raw) // (2 * channels) * 2 * channels]).view(-1, channels).mean(1), rate


def write_wav(path: str | Path, waveform: Tensor, sample_rate: int) -> None:
    """Writes samples [n] as a WAV file of 16 bits; what is beyond -1 to 1 is cut off."""
    check_tensor("write_wav", "waveform", waveform)
    pcm = (waveform.clamp(-1, 1) * 32767).round().to(torch.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(pcm.numpy().tobytes())


def _from_pcm(raw: bytes) -> Tensor:
    if len(raw) < 2:
        return torch.empty(0)
    samples = torch.frombuffer(bytearray(raw[: len(raw) // 2 * 2]), dtype=torch.int16)
    return samples.float() / 32768

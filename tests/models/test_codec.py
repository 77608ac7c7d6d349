# SPDX-License-Identifier: Apache-2.0
"""Codec: an orthonormal transform, codes with the same bits in any company, bytes that give them back or say why."""

from __future__ import annotations

import math
import shutil
import wave
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from pycore import BitstreamError
from pycore.models.codec import Codec, CodecConfig
from pycore.models.codec_audio import espeak, read_wav, resample, synthetic_vowels, write_wav

SMALL = CodecConfig(hop=24, quantizers=5, codes=30, layers=2, dim=32, heads=2, window=20)


@pytest.fixture(scope="module")
def codec() -> Codec:
    torch.manual_seed(0)
    codec = Codec(SMALL)
    for _ in range(3):
        codec(synthetic_vowels(1.0)[None])
    with torch.no_grad():  # away from even distributions, so that differences would show
        for head in codec.code_model.heads:
            head.weight.mul_(20)
    return codec.eval()


@pytest.fixture(scope="module")
def sound() -> Tensor:
    return synthetic_vowels(0.25, seed=3)


# ---- the transform ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 23, 24, 25, 240, 1001])
def test_transform_is_orthonormal(codec: Codec, length: int) -> None:
    x = torch.randn(2, length)
    frames = codec.frames(x)
    assert frames.shape == (2, math.ceil(length / 24) + 1, 24)
    torch.testing.assert_close(codec.waveform(frames, length), x, rtol=0, atol=3e-6)
    torch.testing.assert_close(frames.square().sum(), x.square().sum(), rtol=1e-4, atol=1e-6)


def test_transform_by_hand(codec: Codec) -> None:
    """The textbook's sum, channels in three bands of every third frequency."""
    x = torch.randn(24 * 4)
    n, k = torch.arange(48.0).double(), torch.arange(24.0).double()
    window = torch.sin(math.pi / 48 * (n + 0.5))
    cosines = torch.cos(math.pi / 24 * (n + 0.5 + 12) * (k[:, None] + 0.5)) * math.sqrt(2 / 24)
    expected = (cosines * window) @ x[24:72].double()
    order = [*range(2, 24, 3), *range(1, 24, 3), *range(0, 24, 3)]
    torch.testing.assert_close(codec.frames(x)[2].double(), expected[order], rtol=1e-4, atol=1e-5)


# ---- codes -----------------------------------------------------------------------------------------------------------


def test_encode_is_what_forward_gives(codec: Codec, sound: Tensor) -> None:
    decoded, codes, _ = codec(sound[None])
    assert torch.equal(codec.encode(sound[None]), codes) and torch.equal(codec.encode(sound), codes[0])
    assert torch.equal(codec.decode(codes, length=len(sound)), decoded)
    assert torch.equal(codec.encode(sound, quantizers=2), codes[0, :, :2])
    error = (decoded - sound).square().mean() / sound.square().mean()
    assert error < 0.8
    coarse = codec.decode(codes[..., :3], length=len(sound))
    assert (coarse - sound).square().mean() > (decoded - sound).square().mean()


@pytest.mark.usefixtures("isa", "threads")
def test_codes_do_not_depend_on_company(codec: Codec, sound: Tensor) -> None:
    """A longer waveform, a batch and one thread give every whole frame the codes it has alone."""
    whole = codec.encode(sound)
    prefix = codec.encode(sound[: 24 * 50])
    assert torch.equal(prefix[:-1], whole[:50])
    torch.set_num_threads(1)
    assert torch.equal(codec.encode(torch.stack([sound.flip(0), sound]))[1], whole)


def test_masked_stages_see_their_band(codec: Codec) -> None:
    frames = torch.randn(1, 50, 24)
    changed = frames.clone()
    changed[..., 8:] = torch.randn(1, 50, 16)
    before, after = codec.quantizer.encode(frames), codec.quantizer.encode(changed)
    assert torch.equal(before[..., 0], after[..., 0]) and not torch.equal(before[..., 1], after[..., 1])
    plain = Codec(CodecConfig(hop=24, quantizers=3, codes=8, masked=0, dim=8, heads=1))
    assert plain.quantizer.channel_masks is None and plain(torch.randn(1, 500))[1].shape == (1, 22, 3)


# ---- the code model --------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.usefixtures("isa")
def test_code_model_has_the_same_bits_frame_by_frame(codec: Codec, sound: Tensor) -> None:
    codes = codec.encode(sound)[None]
    model = codec.code_model
    whole = model(codes)
    assert whole.shape == (*codes.shape, 30) and codes.shape[1] > 3 * SMALL.window
    assert torch.equal(model(codes[:, :40]), whole[:, :40])
    assert torch.equal(model(torch.cat([codes.flip(1), codes]))[1], whole[0])
    caches, last = model.caches(), torch.full((1, 1, 5), -1)
    for t in range(codes.shape[1]):
        context = model.context(last, caches)
        last = codes[:, t : t + 1]
        for q in range(5):
            assert torch.equal(model.stage(q, context, last), whole[:, t : t + 1, q])


@torch.no_grad()
def test_code_model_sees_what_comes_before_and_nothing_else(codec: Codec, sound: Tensor) -> None:
    codes = codec.encode(sound)[None]
    whole = codec.code_model(codes)
    changed = codes.clone()
    changed[0, 30, 2] = (changed[0, 30, 2] + 1) % 30
    other = codec.code_model(changed)
    assert torch.equal(other[:, :30], whole[:, :30]) and torch.equal(other[:, 30, :3], whole[:, 30, :3])
    assert not torch.equal(other[:, 30, 3], whole[:, 30, 3]) and not torch.equal(other[:, 31, 0], whole[:, 31, 0])


def test_code_model_learns(sound: Tensor) -> None:
    torch.manual_seed(0)
    codec = Codec(SMALL)
    codec(sound[None])
    codes = codec.eval().encode(sound)
    fixed = codes.numel() * math.log2(30) / 8
    assert abs(len(codec.to_bytes(codes)) - fixed) < 0.1 * fixed + 32, "untrained, distributions are about even"
    optimizer = torch.optim.AdamW(codec.code_model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = functional.cross_entropy(codec.code_model(codes[None]).flatten(0, 2), codes.flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in codec.code_model.parameters())
        optimizer.step()
    data = codec.to_bytes(codes)
    assert len(data) < 0.5 * fixed and torch.equal(codec.from_bytes(data), codes)
    with torch.no_grad():
        bits = functional.cross_entropy(codec.code_model(codes[None]).flatten(0, 2), codes.flatten(), reduction="sum")
    assert len(data) <= bits.item() / math.log(2) / 8 * 1.01 + 8 + 32, "the coder adds next to nothing"


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("isa", "threads")
def test_bytes_decode_to_the_codes(codec: Codec, sound: Tensor) -> None:
    codes = codec.encode(sound)[:60]
    torch.set_num_threads(2)
    data = codec.to_bytes(codes)
    torch.set_num_threads(1)
    assert codec.to_bytes(codes) == data
    assert torch.equal(codec.from_bytes(data), codes)
    for n in (1, 3):
        fewer = codec.to_bytes(codes[:, :n])
        assert torch.equal(codec.from_bytes(fewer, quantizers=n), codes[:, :n]) and len(fewer) < len(data)
    empty = codec.from_bytes(codec.to_bytes(codes[:0]))
    assert empty.shape == (0, 5) and empty.dtype == torch.int64


def test_several_streams_are_those_of_each_alone(codec: Codec, sound: Tensor) -> None:
    codes = codec.encode(sound)
    parts = [codes[:9], codes[20:24], codes[:0], codes[30:60], codes[9:18]]
    streams = codec.to_bytes(parts)
    assert streams == [codec.to_bytes(part) for part in parts]
    assert all(torch.equal(mine, part) for mine, part in zip(codec.from_bytes(streams), parts, strict=True))
    alike = codec.to_bytes([parts[0], parts[4]])
    assert alike == [streams[0], streams[4]]
    assert codec.to_bytes([]) == codec.from_bytes([]) == []
    assert codec.to_bytes([codes[:0]]) == [streams[2]]
    with pytest.raises(BitstreamError):
        codec.from_bytes([streams[0], streams[1][:-1]])
    with pytest.raises(ValueError, match="^Codec: codes has 4 codes a frame in one of the list and must have 5"):
        codec.to_bytes([codes, codes[:, :4]])
    decoded = codec.from_bytes(streams[0])
    assert not decoded.is_inference()
    decoded += 1


def test_damaged_and_foreign_streams_are_reported(codec: Codec, sound: Tensor) -> None:
    codes = codec.encode(sound)[:6]
    data = codec.to_bytes(codes)
    for at in range(0, len(data), 7):
        broken = bytearray(data)
        broken[at] ^= 16
        with pytest.raises(BitstreamError):
            codec.from_bytes(bytes(broken))
    for wrong in (data[:-1], data + b"\0", b"", b"RIFF" + data):
        with pytest.raises(BitstreamError):
            codec.from_bytes(wrong)
    torch.manual_seed(9)
    with pytest.raises(BitstreamError, match="was coded with another model"):
        Codec(SMALL).from_bytes(data)
    with pytest.raises(BitstreamError, match="^Codec: data has 30 codes and must have a multiple of 4$"):
        codec.from_bytes(data, quantizers=4)


def test_state_dict_makes_the_same_codec(codec: Codec, sound: Tensor) -> None:
    torch.manual_seed(9)
    other = Codec(SMALL).eval()
    other.load_state_dict(codec.state_dict())
    data = codec.to_bytes(codec.encode(sound)[:20])
    assert torch.equal(other.from_bytes(data), other.encode(sound)[:20])


class CalledOps(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


def test_runs_on_pycores_ops_alone(codec: Codec, sound: Tensor) -> None:
    with CalledOps() as called:
        codes = codec.encode(sound[:200])
        codec.decode(codes)
        data = codec.to_bytes(codes)
    frames = len(codes)
    count = {name: called.names.count(f"pycore::{name}") for name in ("rvq_encode", "attention", "ac_encode_logits")}
    assert count == {"rvq_encode": 1, "attention": SMALL.layers, "ac_encode_logits": 1}
    # The waveform there and back, six projections a layer, two for each stage.
    assert called.names.count("pycore::invariant_linear") == 2 + 6 * SMALL.layers + 2 * SMALL.quantizers
    with CalledOps() as decoding:
        codec.from_bytes(data)
    assert decoding.names.count("pycore::quantize_cdf") == frames * SMALL.quantizers
    for names in (called.names, decoding.names):
        torchs = {name.removeprefix("aten::") for name in names if not name.startswith("pycore::")}
        forbidden = ("attention", "softmax", "mm", "matmul", "linear", "einsum", "cdist", "argmin", "norm", "topk")
        assert not [name for name in torchs if any(part in name for part in forbidden)], torchs


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hop": 25}, "hop is 25 and must be even"),
        ({"quantizers": 0}, "quantizers is 0 and must be at least 1"),
        ({"quantizers": 2}, "masked is 3 and must be at most 2, the quantizers"),
        ({"codes": 5000}, "codes is 5000 and must be at most 4096"),
    ],
)
def test_bad_configurations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^CodecConfig: {message}"):
        CodecConfig(**fields)


def test_errors(codec: Codec) -> None:
    with pytest.raises(ValueError, match=r"^Codec: waveform has shape \[3\] of torch.int64 and must have"):
        codec.encode(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="^Codec: waveform is a list"):
        codec.encode([0.0])
    with pytest.raises(ValueError, match="^Codec: length is 49 and must be 0 to 48, the samples there are$"):
        codec.decode(torch.zeros(3, 5, dtype=torch.int64), length=49)
    for codes in (torch.zeros(3, 6, dtype=torch.int64), torch.zeros(1, 3, 5, dtype=torch.int64), torch.zeros(3, 5)):
        with pytest.raises(ValueError, match=r"^Codec: codes has shape .* and must have \[frames, 1 to 5\]"):
            codec.to_bytes(codes)
    with pytest.raises(TypeError, match="^Codec: data is a str"):
        codec.from_bytes("no bytes")
    with pytest.raises(ValueError, match="^Codec: quantizers is 6 and must be at most 5"):
        codec.from_bytes(b"", quantizers=6)
    with pytest.raises(IndexError):
        codec.to_bytes(torch.full((3, 5), 30))


# ---- sound -----------------------------------------------------------------------------------------------------------


def test_vowels() -> None:
    x = synthetic_vowels(2.0, seed=1)
    assert x.shape == (32000,) and x.dtype == torch.float32 and x.abs().max() == pytest.approx(0.5)
    assert torch.equal(x, synthetic_vowels(2.0, seed=1)) and not torch.equal(x, synthetic_vowels(2.0, seed=2))
    power = torch.fft.rfft(x.double()).abs().square()  # bins of half a hertz
    assert power[180:10000].sum() > 0.99 * power.sum(), "between the lowest pitch and 5000 Hz"
    with pytest.raises(ValueError, match="^synthetic_vowels: seconds is 0 and must be positive and finite$"):
        synthetic_vowels(0)


def test_resample() -> None:
    t = torch.arange(22050).double() / 22050
    tone = torch.sin(2 * math.pi * 440 * t).float()
    expected = torch.sin(2 * math.pi * 440 * torch.arange(16000).double() / 16000).float()
    torch.testing.assert_close(resample(tone, 22050, 16000), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(resample(expected, 16000, 22050), tone, rtol=0, atol=1e-5)
    high = torch.sin(2 * math.pi * 9000 * t).float()
    assert resample(high, 22050, 16000).abs().max() < 1e-5, "what the new rate cannot hold is left out"


def test_wav(tmp_path: Path) -> None:
    x = synthetic_vowels(0.1)
    write_wav(tmp_path / "x.wav", x, 16000)
    again, rate = read_wav(tmp_path / "x.wav")
    assert rate == 16000
    torch.testing.assert_close(again, x, rtol=0, atol=1 / 16000)
    with wave.open(str(tmp_path / "two.wav"), "wb") as file:
        file.setparams((2, 2, 8000, 0, "NONE", "NONE"))
        file.writeframes(torch.tensor([[100, 300], [-200, 0]], dtype=torch.int16).numpy().tobytes())
    stereo, _ = read_wav(tmp_path / "two.wav")
    torch.testing.assert_close(stereo * 32768, torch.tensor([200.0, -100.0]))
    (tmp_path / "no.wav").write_bytes(b"no sound")
    with pytest.raises(ValueError, match="is no WAV file that can be read"):
        read_wav(tmp_path / "no.wav")


def test_espeak(monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("espeak-ng"):
        one, other = espeak("One sentence to be read."), espeak("One sentence to be read.", voice="en-gb", pitch=80)
        assert 8000 < len(one) < 80000 and 0.05 < one.abs().max() <= 1 and not torch.equal(one, other)
        with pytest.raises(RuntimeError, match="^espeak: "):
            espeak("One sentence.", voice="no-such-voice")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="^espeak: the program espeak-ng is not installed and must be$"):
        espeak("One sentence.")

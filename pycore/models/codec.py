# SPDX-License-Identifier: Apache-2.0
"""A waveform as codes, and codes as bytes: frames, masked-channel residual quantization, a code model and the coder.

    waveform [n] -- MDCT --> frames [t, hop] -- MaskedChannelRVQ --> codes [t, Q] -- CodeModel, coder --> bytes

The transform is orthonormal, so a frame's error is the waveform's. Neighbouring frequencies go to different bands of
the masked stages. The code model predicts a frame's codes from the frames before it, and each code from the frame's
codes before it too. All of it runs on pycore's ops, whose rows have the same bits in any batch: the model that decodes
a frame at a time, on a cache, gives the distributions that encoding in one pass had.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn import functional

from pycore import ArithmeticDecoder, BitstreamError, ops
from pycore._checks import check_bytes, check_int
from pycore._tensors import check_tensor
from pycore.cache import LambdaKVCache
from pycore.models.bytelm import Block, BytelmConfig
from pycore.models.codec_streams import decode_streams, encode_streams
from pycore.nn.attention import POSITIONS, PositionScheme
from pycore.nn.linear import Projection, RMSNorm
from pycore.nn.staircase import StaircaseLayer
from pycore.nn.vq import MaskedChannelRVQ, ResidualVQ
from pycore.ops.attention_call import AttentionOptions
from pycore.schedules import Lambda

__all__ = ["CodeModel", "Codec", "CodecConfig"]


@dataclass(frozen=True)
class CodecConfig:
    """Shape of a `Codec`.

    Attributes:
        hop: samples from frame to frame, and channels of a frame; even.
        quantizers: codes of a frame, Q.
        masked: the first that many see a band of the channels each; 0 for plain residual quantization.
        codes: of every codebook.
        layers, dim, heads: of the code model.
        window: frames that its attention looks back, and the first four.
        position: how it learns where frames stand, see `pycore.nn.attention.PositionScheme`; of those that rotate, none
            goes with a staircase (`pycore.models.codec_file`).
        sample_rate: samples a second of the sound that it is for.
    """

    hop: int = 128
    quantizers: int = 8
    masked: int = 3
    codes: int = 256
    layers: int = 2
    dim: int = 128
    heads: int = 4
    window: int = 250
    position: str = "rope"
    sample_rate: int = 16000

    def __post_init__(self) -> None:
        for name in ("hop", "quantizers", "codes", "layers", "dim", "heads", "window", "sample_rate"):
            check_int("CodecConfig", name, getattr(self, name), 1)
        check_int("CodecConfig", "masked", self.masked, 0)
        if self.hop % 2:
            raise ValueError(f"CodecConfig: hop is {self.hop} and must be even")
        if self.masked > min(self.quantizers, self.hop):
            most = min(self.quantizers, self.hop)
            raise ValueError(f"CodecConfig: masked is {self.masked} and must be at most {most}, the quantizers")
        if self.position not in POSITIONS:
            raise ValueError(f"CodecConfig: position is {self.position!r} and must be one of {', '.join(POSITIONS)}")
        if self.codes > 4096:  # of a distribution's 2^16 shares
            raise ValueError(f"CodecConfig: codes is {self.codes} and must be at most 4096")


def mdct_basis(hop: int) -> Tensor:
    """[hop, 2 hop]: the windowed cosines of a frame; each is orthogonal to all others, of other frames too."""
    time, frequency = torch.arange(2 * hop, dtype=torch.float64), torch.arange(hop, dtype=torch.float64)
    window = torch.sin(math.pi / (2 * hop) * (time + 0.5))
    phase = math.pi / hop * torch.outer(frequency + 0.5, time + 0.5 + hop / 2)
    return (torch.cos(phase) * window * math.sqrt(2 / hop)).float()


class CodeModel(nn.Module):
    """Distributions of a frame's codes, given the frames before it and the frame's codes so far.

    Attention runs over frames: a frame is the sum of a vector for each of its codes. Each stage has a head of its own,
    which adds the vectors of the frame's codes before it.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        shape = BytelmConfig(layers=config.layers, dim=config.dim, heads=config.heads, kv_heads=config.heads)
        self.schedule = Lambda(4, config.window)
        self.frame = nn.Parameter(torch.randn(config.quantizers, config.codes, config.dim) * 0.1)
        self.so_far = nn.Parameter(torch.randn(config.quantizers, config.codes, config.dim) * 0.1)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(config.layers))
        self.positions = PositionScheme(config.position, config.heads, shape.head_dim, max_distance=config.window)
        self.norms = nn.ModuleList(RMSNorm(config.dim) for _ in range(config.quantizers))
        self.hidden = nn.ModuleList(Projection(config.dim, 2 * config.dim) for _ in range(config.quantizers))
        self.heads = nn.ModuleList(Projection(2 * config.dim, config.codes, gain=0.1) for _ in range(config.quantizers))

    def caches(self) -> list[LambdaKVCache]:
        """An empty cache for each layer."""
        return [LambdaKVCache(self.schedule.sink_size, self.schedule.window_size) for _ in self.blocks]

    def context(self, codes: Tensor, caches: Sequence[LambdaKVCache | StaircaseLayer] | None = None) -> Tensor:
        """[b, t, dim] behind frames of codes [b, t, Q], -1 for what stands before the first."""
        options = AttentionOptions(distance_limit=self.config.window, **self.positions())
        x = ops.rvq_decode(codes, self.frame)
        for layer, block in enumerate(self.blocks):
            x = block(x, options, self.schedule, None if caches is None else caches[layer])
        return x

    def stage(self, q: int, context: Tensor, codes: Tensor) -> Tensor:
        """Logits [b, t, K] of stage q, with the codes [b, t, >= q] before it in the frame."""
        logits: Tensor = self.heads[q](self._before_head(q, context, codes))
        return logits

    def _before_head(self, q: int, context: Tensor, codes: Tensor) -> Tensor:
        known = ops.rvq_decode(codes[..., :q], self.so_far) if q else torch.zeros_like(context)
        x = self.norms[q](context + known)
        return functional.relu(self.hidden[q](x)).square()

    def forward(self, codes: Tensor) -> Tensor:
        """Logits [b, t, n, K] of codes [b, t, n], the first n of Q of every frame."""
        context = self.context(_frames_before(codes))
        return torch.stack([self.stage(q, context, codes) for q in range(codes.shape[-1])], dim=2)

    def loss(self, codes: Tensor) -> Tensor:
        """The mean cross entropy, in nats, of codes [b, t, n]; no logits exist, in neither direction."""
        context = self.context(_frames_before(codes))
        stages = [
            ops.linear_cross_entropy(self._before_head(q, context, codes), head.get_parameter("weight"), codes[..., q])
            for q, head in enumerate(list(self.heads)[: codes.shape[-1]])
        ]
        return torch.stack(stages).mean()


def _frames_before(codes: Tensor) -> Tensor:
    """Codes [b, t, n] moved by a frame, -1 for what stands before the first."""
    return functional.pad(codes[:, :-1], (0, 0, 1, 0), value=-1)[:, : codes.shape[1]]


class Codec(nn.Module):
    """Waveforms to codes to bytes, and back.

    The codebooks learn in training mode, from what `forward` is given (`quantizer` has its own ways to); the code model
    by the cross-entropy of `code_model(codes)`. Both are free to be trained, saved and loaded as any module.

    Example:
        >>> codec = Codec().eval()
        >>> data = codec.to_bytes(codec.encode(waveform))
        >>> again = codec.decode(codec.from_bytes(data), length=waveform.numel())
    """

    basis: Tensor

    def __init__(self, config: CodecConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or CodecConfig()
        # Every band-th frequency beside each other, so that each masked stage sees a part of all of the spectrum.
        bands = max(config.masked, 1)
        order = torch.cat([torch.arange(band, config.hop, bands) for band in reversed(range(bands))])
        self.register_buffer("basis", mdct_basis(config.hop)[order], persistent=False)
        shared: dict[str, Any] = {
            "dim": config.hop, "num_quantizers": config.quantizers, "codebook_size": config.codes, "decay": 0.99,
            "kmeans_init": True, "threshold_ema_dead_code": 2,
        }  # fmt: skip
        self.quantizer: ResidualVQ
        if config.masked:
            self.quantizer = MaskedChannelRVQ(masked_quantizers=config.masked, **shared)
        else:
            self.quantizer = ResidualVQ(**shared)
        self.code_model = CodeModel(config)

    # ---- waveform and frames -----------------------------------------------------------------------------------------

    def frames(self, waveform: Tensor) -> Tensor:
        """The transform of [..., n]: [..., ceil(n / hop) + 1, hop]."""
        check_tensor("Codec", "waveform", waveform)
        if waveform.dim() < 1 or not waveform.is_floating_point():
            raise ValueError(
                f"Codec: waveform has shape {list(waveform.shape)} of {waveform.dtype} and must have [..., samples] of "
                f"floating point"
            )
        hop, length = self.config.hop, waveform.shape[-1]
        padded = functional.pad(waveform.float(), (hop, hop + -length % hop))
        return ops.invariant_linear(padded.unfold(-1, 2 * hop, hop), self.basis)

    def waveform(self, frames: Tensor, length: int | None = None) -> Tensor:
        """The waveform whose transform is `frames` [..., t, hop]: [..., length], by default all (t - 1) hop samples."""
        hop, whole = self.config.hop, (frames.shape[-2] - 1) * self.config.hop
        if length is not None and not 0 <= length <= whole:
            raise ValueError(f"Codec: length is {length} and must be 0 to {whole}, the samples there are")
        halves = ops.invariant_linear(frames, self.basis.mT.contiguous())
        samples = halves[..., 1:, :hop] + halves[..., :-1, hop:]
        return samples.flatten(-2)[..., :length]

    # ---- frames and codes --------------------------------------------------------------------------------------------

    def forward(self, waveform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The decoded waveform [b, n], codes [b, t, Q], and losses [Q]; in training mode the codebooks learn."""
        frames, codes, losses = self.quantizer(self.frames(waveform))
        return self.waveform(frames, waveform.shape[-1]), codes, losses

    def encode(self, waveform: Tensor, *, quantizers: int | None = None) -> Tensor:
        """Codes int64 [t, Q] of a waveform [n], or [b, t, Q] of [b, n]; with `quantizers`, the first of them."""
        frames = self.frames(waveform)
        batched = frames if frames.dim() == 3 else frames.unsqueeze(0)
        codes = self.quantizer.encode(batched, num_quantizers=quantizers)
        return codes if frames.dim() == 3 else codes[0]

    @torch.no_grad()
    def decode(self, codes: Tensor, *, length: int | None = None) -> Tensor:
        """The waveform of codes [..., t, n], the first n of a frame's codes: [..., length]."""
        return self.waveform(self.quantizer.decode(codes), length)

    # ---- codes and bytes ---------------------------------------------------------------------------------------------

    @property
    def model_id(self) -> int:
        """A fingerprint of the code model's weights, which a stream carries."""
        check = 0
        for weight in self.code_model.state_dict().values():
            check = zlib.crc32(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes(), check)
        return check

    @overload
    def to_bytes(self, codes: Tensor) -> bytes: ...
    @overload
    def to_bytes(self, codes: Sequence[Tensor]) -> list[bytes]: ...

    @torch.no_grad()
    def to_bytes(self, codes: Tensor | Sequence[Tensor]) -> bytes | list[bytes]:
        """Codes [t, n], the first n of Q of every frame, as one stream of the arithmetic coder.

        A list of codes, of any lengths and all with the same n, gives a list of the streams that each gives alone: they
        go through the code model together.
        """
        if not isinstance(codes, list | tuple):
            self._check_codes(codes)
            return encode_streams(self.code_model, [codes], self.model_id)[0]  # type: ignore[list-item]
        for each in codes:
            self._check_codes(each)
        return encode_streams(self.code_model, codes, self.model_id) if codes else []

    @overload
    def from_bytes(self, data: bytes, *, quantizers: int | None = None) -> Tensor: ...
    @overload
    def from_bytes(self, data: Sequence[bytes], *, quantizers: int | None = None) -> list[Tensor]: ...

    def from_bytes(self, data: bytes | Sequence[bytes], *, quantizers: int | None = None) -> Tensor | list[Tensor]:
        """The codes int64 [t, n] of a stream from `to_bytes`; `quantizers` is its n, if that is not Q.

        Each code waits for the one before it, so a stream alone takes a run of the code model for every code. A list of
        streams takes no more runs than the longest of them, and gives a list.

        Raises:
            BitstreamError: a stream that is damaged, no stream, or from a codec with other weights.
        """
        several = isinstance(data, list | tuple)
        streams: Sequence[bytes] = data if several else [data]  # type: ignore[assignment, list-item]
        for stream in streams:
            check_bytes("Codec", "data", stream)
        stages = self.config.quantizers if quantizers is None else quantizers
        check_int("Codec", "quantizers", stages, 1, self.config.quantizers)
        model_id = self.model_id
        decoders = [ArithmeticDecoder(stream, model_id=model_id) for stream in streams]
        for decoder in decoders:
            if len(decoder) % stages:
                raise BitstreamError(f"Codec: data has {len(decoder)} codes and must have a multiple of {stages}")
        frames = [len(decoder) // stages for decoder in decoders]
        with torch.inference_mode():  # autograd, which has nothing to do here, is a third of the time
            found = decode_streams(self.code_model, decoders, frames, stages)
        for decoder in decoders:
            decoder.finish()
        codes = [
            torch.from_numpy(found[row, :count].copy()) if count else torch.empty(0, stages, dtype=torch.int64)
            for row, count in enumerate(frames)
        ]
        return codes if several else codes[0]

    def _check_codes(self, codes: Any) -> None:
        check_tensor("Codec", "codes", codes)
        most = self.config.quantizers
        if codes.dim() != 2 or not 1 <= codes.shape[1] <= most or codes.dtype != torch.int64:
            raise ValueError(
                f"Codec: codes has shape {list(codes.shape)} of {codes.dtype} and must have [frames, 1 to {most}] of "
                f"torch.int64"
            )

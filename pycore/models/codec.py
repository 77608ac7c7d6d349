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
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pycore import ArithmeticDecoder, ArithmeticEncoder, BitstreamError, ops
from pycore._checks import check_bytes, check_int
from pycore._tensors import check_tensor
from pycore.models.codec_model import CodecConfig, CodeModel
from pycore.nn.vq import MaskedChannelRVQ, ResidualVQ

__all__ = ["CodeModel", "Codec", "CodecConfig"]


def mdct_basis(hop: int) -> Tensor:
    """[hop, 2 hop]: the windowed cosines of a frame; each is orthogonal to all others, of other frames too."""
    time, frequency = torch.arange(2 * hop, dtype=torch.float64), torch.arange(hop, dtype=torch.float64)
    window = torch.sin(math.pi / (2 * hop) * (time + 0.5))
    phase = math.pi / hop * torch.outer(frequency + 0.5, time + 0.5 + hop / 2)
    return (torch.cos(phase) * window * math.sqrt(2 / hop)).float()


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
            return self._streams([codes])[0]  # type: ignore[list-item]
        for each in codes:
            self._check_codes(each)
            if each.shape[1] != codes[0].shape[1]:
                raise ValueError(
                    f"Codec: codes has {each.shape[1]} codes a frame in one of the list and must have "
                    f"{codes[0].shape[1]}, as the first"
                )
        return self._streams(codes) if codes else []

    def _streams(self, codes: Sequence[Tensor]) -> list[bytes]:
        model_id, longest = self.model_id, max(map(len, codes))
        if not longest:
            return [ArithmeticEncoder(model_id=model_id).finish() for _ in codes]
        # What pads a row comes after it, and changes nothing before.
        rows = torch.stack([functional.pad(each, (0, 0, 0, longest - len(each))) for each in codes])
        logits, rows = self.code_model(rows).flatten(1, 2), rows.flatten(1)
        if all(len(each) == longest for each in codes):
            return ops.ac_encode_logits(rows, logits, model_id=model_id).to_bytes()
        counts = [each.numel() for each in codes]
        return [
            ops.ac_encode_logits(row[None, :n], of_row[None, :n], model_id=model_id).to_bytes()[0]
            if n else ArithmeticEncoder(model_id=model_id).finish()
            for row, of_row, n in zip(rows, logits, counts, strict=True)
        ]  # fmt: skip

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
            found = self._decode(decoders, frames, stages)
        for decoder in decoders:
            decoder.finish()
        codes = [
            torch.from_numpy(found[row, :count].copy()) if count else torch.empty(0, stages, dtype=torch.int64)
            for row, count in enumerate(frames)
        ]
        return codes if several else codes[0]

    def _decode(self, decoders: Sequence[ArithmeticDecoder], frames: Sequence[int], stages: int) -> NDArray[np.int64]:
        """Codes [streams, the most frames, stages], zeros behind a stream's end."""
        out = np.zeros((len(decoders), max(frames, default=0), stages), dtype=np.int64)
        # Those that go on longest come first, so that the ones in use are the first of a batch.
        order = sorted(range(len(decoders)), key=lambda row: -frames[row])
        caches = self.code_model.caches()
        newest = torch.full((len(decoders), 1, stages), -1)
        for frame in range(out.shape[1]):
            using = [row for row in order if frames[row] > frame]
            context = self.code_model.context(newest, caches)[: len(using)]
            newest = torch.zeros_like(newest)
            for q in range(stages):
                logits = self.code_model.stage(q, context, newest[: len(using)])[:, 0]
                cdf = ops.quantize_cdf(logits=logits).numpy()
                symbols = [decoders[row].decode(cdf[at]) for at, row in enumerate(using)]
                newest[: len(using), 0, q] = torch.tensor(symbols)
            out[using, frame] = newest[: len(using), 0].numpy()
        return out

    def _check_codes(self, codes: Any) -> None:
        check_tensor("Codec", "codes", codes)
        most = self.config.quantizers
        if codes.dim() != 2 or not 1 <= codes.shape[1] <= most or codes.dtype != torch.int64:
            raise ValueError(
                f"Codec: codes has shape {list(codes.shape)} of {codes.dtype} and must have [frames, 1 to {most}] of "
                f"torch.int64"
            )

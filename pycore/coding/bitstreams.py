# SPDX-License-Identifier: Apache-2.0
"""What `pycore.ops.ac_encode` returns: coded streams side by side in one tensor."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pycore._checks import check_bytes
from pycore._tensors import check_tensor

__all__ = ["Bitstreams"]


class Bitstreams:
    """Coded streams: stream i is data[offsets[i]:offsets[i + 1]].

    Attributes:
        data: uint8 [bytes], all streams one after another. docs/formats.md says what the bytes of a stream mean.
        offsets: int64 [streams + 1], rising from 0 to the number of bytes.

    Raises:
        TypeError: data or offsets is no tensor.

    Example:
        >>> streams = pycore.ops.ac_encode(symbols, cdf)
        >>> again = pycore.Bitstreams.from_bytes(streams.to_bytes())
    """

    def __init__(self, data: Tensor, offsets: Tensor) -> None:
        for name, tensor in (("data", data), ("offsets", offsets)):
            check_tensor("Bitstreams", name, tensor)
        self.data = data
        self.offsets = offsets

    @classmethod
    def from_bytes(cls, streams: Iterable[bytes]) -> Bitstreams:
        """Streams as `to_bytes` gave them, in any number and from any calls.

        Raises:
            TypeError: streams is one bytes object, or an element is no bytes-like object.
        """
        if isinstance(streams, bytes | bytearray | memoryview):
            raise TypeError(f"Bitstreams.from_bytes: streams is a {type(streams).__name__} and must be a list of them")
        parts = list(streams)
        for i, part in enumerate(parts):
            check_bytes("Bitstreams.from_bytes", f"streams[{i}]", part)
        joined = bytearray(b"".join(parts))
        data = torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
        offsets = torch.zeros(len(parts) + 1, dtype=torch.int64)
        offsets[1:] = torch.tensor([memoryview(part).nbytes for part in parts], dtype=torch.int64).cumsum(0)
        return cls(data, offsets)

    def to_bytes(self) -> list[bytes]:
        """Each stream by itself."""
        joined, ends = self.data.cpu().contiguous().numpy().tobytes(), self.offsets.tolist()
        return [joined[begin:end] for begin, end in zip(ends[:-1], ends[1:], strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes of all streams together, frames included."""
        return self.data.numel()

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    def __repr__(self) -> str:
        return f"Bitstreams({len(self)} streams, {self.nbytes} bytes)"


Bitstreams.__module__ = "pycore"  # its public home

# SPDX-License-Identifier: Apache-2.0
"""Classes by the distances from prototypes, which can be looked at."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pycore._checks import check_int
from pycore.nn.linear import Projection
from pycore.ops import invariant_linear, pairwise_min
from pycore.ops._pairwise import widened

__all__ = ["PrototypeLayer"]


class PrototypeLayer(nn.Module):
    """Class logits from an encoding's squared distances to learned prototypes, and what keeps prototypes real.

    Trained with ``cross_entropy(logits) + w1 r1 + w2 r2 + w reconstruction``, where a decoder reconstructs the input
    from its encoding: R1 then draws every prototype to an example, so that the decoder can show it, and R2 every
    example to a prototype.

    Args:
        dim: channels of an encoding.
        prototypes: how many.
        classes: how many.

    Example:
        >>> layer = PrototypeLayer(10, 15, 10)
        >>> encoding = encoder(images)  # [batch, 10]
        >>> r1, r2 = layer.losses(encoding)
        >>> loss = F.cross_entropy(layer(encoding), labels) + 0.05 * (r1 + r2)
        >>> pictures = decoder(layer.prototypes)

    Raises:
        ValueError: a number that does not fit; in ``forward`` and ``losses``, a shape, dtype or device.
        TypeError: an argument of the wrong type.

    Source: Li, Liu, Chen and Rudin, "Deep Learning for Case-Based Reasoning through Prototypes" (AAAI 2018).
    """

    def __init__(self, dim: int, prototypes: int, classes: int) -> None:
        super().__init__()
        for name, number in (("dim", dim), ("prototypes", prototypes), ("classes", classes)):
            check_int("PrototypeLayer", name, number, 1)
        self.prototypes = nn.Parameter(torch.rand(prototypes, dim))
        self.classes = Projection(prototypes, classes)

    def distances(self, x: Tensor) -> Tensor:
        """Squared distances of encodings ``[..., dim]`` to every prototype, ``[..., prototypes]``."""
        rows, prototypes = self._rows(x)
        # From differences: by products, what is close to a prototype has a distance of rounding errors.
        distances = torch.cdist(rows, prototypes, compute_mode="donot_use_mm_for_euclid_dist").square()
        return distances.reshape(*x.shape[:-1], prototypes.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[..., classes]`` of encodings ``[..., dim]``."""
        distances = self.distances(x)
        return invariant_linear(distances, self.classes.weight.to(distances.dtype))

    def losses(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """R1 and R2 of encodings ``[..., dim]``, of which there is at least one.

        R1 is the mean, over prototypes, of the squared distance to the nearest encoding; R2 the mean, over encodings,
        of that to the nearest prototype.
        """
        to_prototypes, to_encodings = pairwise_min(*self._rows(x))
        return to_encodings.mean(), to_prototypes.mean()

    def _rows(self, x: Tensor) -> list[Tensor]:
        op = "PrototypeLayer"
        if isinstance(x, Tensor) and x.dim() == 1:
            x = x.unsqueeze(0)
        rows, prototypes = widened(op, x=x, prototypes=self.prototypes)
        return [rows.reshape(-1, rows.shape[-1]), prototypes]

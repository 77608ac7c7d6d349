# SPDX-License-Identifier: Apache-2.0
"""Late interaction: a query's tokens each find their best token of a document."""

from __future__ import annotations

from torch import Tensor, nn

from pycore._checks import check_bool, check_int
from pycore.nn.linear import Projection
from pycore.ops import invariant_linear, maxsim
from pycore.ops._pairwise import unit_rows, widened

__all__ = ["LateInteraction"]


class LateInteraction(nn.Module):
    """ColBERT's score of a query and a document: tokens projected to few channels, of length 1, then MaxSim.

    Args:
        dim: channels of the tokens that an encoder gives.
        channels: channels of the projection, 128 in ColBERT. None: tokens are compared as they are.
        normalize: whether projected tokens are divided by their length.

    Example:
        >>> score = LateInteraction(384)
        >>> scores = score(queries, documents, document_lengths=lengths)  # [queries, documents]
        >>> index = score.encode(documents)  # once, then maxsim(score.encode(query), index)

    Raises:
        ValueError: a number that does not fit; in ``forward``, a shape, dtype, device or length.
        TypeError: an argument of the wrong type.

    Source: Khattab and Zaharia, "ColBERT: Efficient and Effective Passage Search via Contextualized Late Interaction
    over BERT".
    """

    def __init__(self, dim: int, channels: int | None = 128, *, normalize: bool = True) -> None:
        super().__init__()
        op = "LateInteraction"
        check_int(op, "dim", dim, 1)
        if channels is not None:
            check_int(op, "channels", channels, 1)
        check_bool(op, "normalize", normalize)
        self.dim, self.normalize = dim, normalize
        self.projection = None if channels is None else Projection(dim, channels)

    def encode(self, tokens: Tensor) -> Tensor:
        """What `maxsim` compares, ``[..., channels]``, of tokens ``[..., dim]``; a token alone has the same bits."""
        op = "LateInteraction"
        (rows,) = widened(op, tokens=tokens)
        if rows.shape[-1] != self.dim:
            raise ValueError(f"{op}: tokens have {rows.shape[-1]} channels and must have {self.dim}")
        if self.projection is not None:
            rows = invariant_linear(*widened(op, tokens=tokens, weight=self.projection.weight))
        return unit_rows(rows) if self.normalize else rows

    def forward(
        self, query: Tensor, document: Tensor, *, query_lengths: Tensor | None = None,
        document_lengths: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Scores ``[Q, P]``, float32, without the dimensions that an argument does not have.

        Args:
            query: ``[Q, L, dim]``, or ``[L, dim]`` for one.
            document: ``[P, M, dim]``, or ``[M, dim]`` for one; ``[Q, P, M, dim]`` where every query has its own.
            query_lengths: int64 ``[Q]``, tokens of each query that count.
            document_lengths: int64 ``[P]`` or ``[Q, P]``. A document of no tokens has -inf.
        """
        return maxsim(
            self.encode(query), self.encode(document), query_lengths=query_lengths, document_lengths=document_lengths
        )

# SPDX-License-Identifier: Apache-2.0
"""Lossless compression with a language model: what it thinks likely costs few bits.

The text is cut into segments, which are read side by side, each from its own start. `compress` reads many tokens of
each in one pass; `decompress` gets them one by one, from the cache. Both see the same logits to the last bit, whatever
the chunks, the batch and the threads, and so the arithmetic coder gives back what it was given.

    python -m pycore.models.lmzip compress FILE [-o OUT]      FILE or OUT may be -, standard input and output
    python -m pycore.models.lmzip decompress FILE [-o OUT]

docs/formats.md has the format. What is damaged is a BitstreamError, and nothing is written.
"""

from __future__ import annotations

from pycore.models.lmzip.container import compress, decompress

__all__ = ["compress", "decompress"]

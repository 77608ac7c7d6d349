# SPDX-License-Identifier: Apache-2.0
"""Key-value caches whose attention gives the same bits as attention over everything that was ever appended."""

from pycore.cache.kv_cache import KVCache
from pycore.cache.lambda_cache import LambdaKVCache

__all__ = ["KVCache", "LambdaKVCache"]

KVCache.__module__ = LambdaKVCache.__module__ = __name__

# SPDX-License-Identifier: Apache-2.0
"""Attention, caches and a loss for Hugging Face transformers (4.57 and newer): one call registers, a name chooses.

    register(sink_size=16, window_size=1024)
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="pycore_lambda")
    model.generate(**inputs, past_key_values=LambdaCache(sink_size=16, window_size=1024))

    same_bits(model)

docs/integrations/transformers.md says which models, what padding and caches do, and what is refused.
"""

from pycore.integrations.transformers._cache import KVCache, LambdaCache
from pycore.integrations.transformers._loss import register_loss, unregister_loss
from pycore.integrations.transformers._register import register, register_probabilistic, set_round
from pycore.integrations.transformers._same_bits import same_bits
from pycore.integrations.transformers._staircase import StaircaseCache

__all__ = [
    "KVCache",
    "LambdaCache",
    "StaircaseCache",
    "register",
    "register_loss",
    "register_probabilistic",
    "same_bits",
    "set_round",
    "unregister_loss",
]

KVCache.__module__ = __name__
LambdaCache.__module__ = __name__
StaircaseCache.__module__ = __name__

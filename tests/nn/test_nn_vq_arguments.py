# SPDX-License-Identifier: Apache-2.0
"""Every argument of vector-quantize-pytorch 1.32's modules is taken, with its default, or refused by its name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from pycore.nn import GroupedResidualVQ, ResidualVQ, VectorQuantize

# Taken, with the default that they have there.
TAKEN: dict[type[nn.Module], dict[str, Any]] = {
    VectorQuantize: {
        "codebook_dim": None, "heads": 1, "separate_codebook_per_head": False, "decay": 0.8, "eps": 1e-5,
        "freeze_codebook": False, "kmeans_init": False, "kmeans_iters": 10, "sync_kmeans": True,
        "use_cosine_sim": False, "layernorm_after_project_in": False, "threshold_ema_dead_code": 0,
        "channel_last": True, "accept_image_fmap": False, "accept_3d_fmap": False, "commitment_weight": 1.0,
        "orthogonal_reg_weight": 0.0, "orthogonal_reg_active_codes_only": False, "orthogonal_reg_max_codes": None,
        "rotation_trick": None, "directional_reparam": False, "directional_reparam_variance": 5e-3,
        "sync_codebook": None, "ema_update": None, "manual_ema_update": False, "learnable_codebook": None,
        "sync_update_v": 0.0, "return_zeros_for_masked_padding": True, "route_gradients_to_input": True,
    },
    ResidualVQ: {
        "num_quantizers": None, "codebook_dim": None, "shared_codebook": False, "diveq": False,
        "quantize_dropout": False, "quantize_dropout_cutoff_index": 0, "quantize_dropout_multiple_of": 1,
        "accept_image_fmap": False, "beam_size": None, "eval_beam_size": None, "quant_grad_frac": 0.0,
        "return_zeros_for_masked_padding": True,
    },
    GroupedResidualVQ: {"groups": 1, "accept_image_fmap": False},
}  # fmt: skip
TAKEN_IN_FORWARD = {
    VectorQuantize: [
        "x", "mask", "lens", "topk", "freeze_codebook", "return_loss_breakdown", "ema_update_weight",
        "accum_ema_update", "ema_update",
    ],
    ResidualVQ: [
        "x", "mask", "return_all_codes", "freeze_codebook", "beam_size", "rand_quantize_dropout_fixed_seed",
    ],
    GroupedResidualVQ: ["x", "return_all_codes", "freeze_codebook", "mask"],
}  # fmt: skip
# Refused: the default, which passes, and another value, which does not.
REFUSED = {
    "commitment_use_cross_entropy_loss": (False, True),
    "codebook_diversity_loss_weight": (0.0, 0.1),
    "codebook_diversity_temperature": (100.0, 10.0),
    "stochastic_sample_codes": (False, True),
    "sample_codebook_temp": (1.0, 0.5),
    "straight_through": (False, True),
    "sync_affine_param": (False, True),
    "vq_bridge": (None, nn.Identity()),
    "in_place_codebook_optimizer": (None, torch.optim.SGD),
    "manual_in_place_optimizer_update": (False, True),
    "affine_param": (False, True),
    "affine_param_batch_decay": (0.99, 0.9),
    "affine_param_codebook_decay": (0.9, 0.8),
}
REFUSED_IN_RESIDUAL = {
    "heads": (1, 2),
    "implicit_neural_codebook": (False, True),
    "mlp_kwargs": ({}, {"depth": 2}),
    "beam_score_quantizer_weights": (None, [1.0, 1.0]),
}
MAKERS = {
    "VectorQuantize": lambda **keywords: VectorQuantize(8, 5, **keywords),
    "ResidualVQ": lambda **keywords: ResidualVQ(dim=8, codebook_size=5, num_quantizers=2, **keywords),
    "GroupedResidualVQ": lambda **keywords: GroupedResidualVQ(
        dim=16, groups=2, codebook_size=5, num_quantizers=2, **keywords
    ),
}


@pytest.mark.parametrize("module", list(TAKEN), ids=lambda module: module.__name__)
def test_taken_with_the_same_default(module: type[nn.Module]) -> None:
    ours = inspect.signature(module.__init__).parameters
    for name, default in TAKEN[module].items():
        assert ours[name].default == default and type(ours[name].default) is type(default), name
    assert set(TAKEN_IN_FORWARD[module]) <= set(inspect.signature(module.forward).parameters)


@pytest.mark.parametrize("maker", MAKERS)
def test_every_other_is_refused_by_name(maker: str) -> None:
    refused = REFUSED if maker == "VectorQuantize" else {**REFUSED, **REFUSED_IN_RESIDUAL}
    for name, (default, other) in refused.items():
        MAKERS[maker](**{name: default})
        with pytest.raises(ValueError, match=rf"^\w+: {name} is .*, which is not available, and must be "):
            MAKERS[maker](**{name: other})


@pytest.mark.parametrize("maker", MAKERS)
def test_forward_refuses_by_name(maker: str) -> None:
    module, x = MAKERS[maker](), torch.zeros(1, 3, 16 if maker == "GroupedResidualVQ" else 8)
    refused = {"indices": torch.zeros(1, 3, dtype=torch.int64), "sample_codebook_temp": 0.5}
    if maker == "VectorQuantize":
        refused["codebook_transform_fn"] = nn.Identity()
    for name, value in refused.items():
        module(x, **{name: None})
        with pytest.raises(ValueError, match=rf"^\w+: {name} is .*, which is not available, and must be None$"):
            module(x, **{name: value})

# SPDX-License-Identifier: Apache-2.0
"""BottleneckClassifier remembers what it is not trained on; with_codebooks speaks in codes that can be switched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from pycore.models.bytelm import BOS, Bytelm, BytelmConfig
from pycore.models.memory import (
    BottleneckClassifier,
    codebook_loss,
    codebooks,
    learn_codebooks,
    with_codebooks,
)
from pycore.schedules import Lambda


class CalledOps(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> int:
        return self.names.count(f"pycore::{name}")

    def torchs(self, *parts: str) -> set[str]:
        return {name for name in self.names if not name.startswith("pycore::") and any(part in name for part in parts)}


# ---- the classifier --------------------------------------------------------------------------------------------------


def clusters(per_class: int = 60) -> tuple[Tensor, Tensor]:
    """Six classes far apart."""
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(6, 16, generator=generator)
    classes = torch.arange(6).repeat_interleave(per_class)
    return centres[classes] + 0.3 * torch.randn(len(classes), 16, generator=generator), classes


def trained_keys(**keywords: Any) -> BottleneckClassifier:
    torch.manual_seed(0)
    model = BottleneckClassifier(16, 6, **{"books": 12, "keys": 24, "key_dim": 4, **keywords})
    model.learn_keys(clusters()[0], epochs=3, batch_size=90)
    return model


def fit(model: BottleneckClassifier, x: Tensor, classes: Tensor, steps: int = 10) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=30.0)
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), classes).backward()
        optimizer.step()


def test_classes_learned_one_after_another_stay() -> None:
    model, (x, classes) = trained_keys(), clusters()
    for first in (0, 2, 4):
        rows = (classes == first) | (classes == first + 1)
        fit(model, x[rows], classes[rows])
    assert (model(x).max(1).indices == classes).float().mean() > 0.98
    # A class that is trained no more keeps its values but for the keys that later classes hit too.
    values, last = model.bottleneck.values.detach().clone(), classes >= 4
    fit(model, x[last], classes[last])
    hit = torch.stack([model.codes(x[last])[:, book].bincount(minlength=24) > 0 for book in range(12)])
    assert torch.equal(model.bottleneck.values[~hit], values[~hit])
    assert not torch.equal(model.bottleneck.values[hit], values[hit])


def test_logits_are_the_mean_of_the_nearest_keys_values() -> None:
    model, (x, _) = trained_keys(), clusters()
    nn.init.normal_(model.bottleneck.values)
    expected = torch.zeros(len(x), 6)
    for book in range(12):
        keys = x @ model.bottleneck.rand_proj[book]
        codes = torch.cdist(keys, model.bottleneck.vq.codebook[book]).min(1).indices
        assert torch.equal(model.codes(x)[:, book], codes)
        expected += model.bottleneck.values[book].detach()[codes] / 12
    torch.testing.assert_close(model(x), expected)


def test_only_learn_keys_moves_keys() -> None:
    model, (x, classes) = trained_keys(), clusters()
    keys = model.bottleneck.vq.codebook.clone()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    fit(model, x, classes, steps=1)
    assert torch.equal(model.bottleneck.vq.codebook, keys)
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["bottleneck.values"]
    assert [name for name, _ in model.named_parameters()] == ["bottleneck.values"]
    model.learn_keys(x + 1, epochs=20, batch_size=120)
    assert not torch.equal(model.bottleneck.vq.codebook, keys) and model.training
    # Keys that nothing hits have moved to where inputs are: most of them are hit.
    used = torch.stack([model.codes(x + 1)[:, book].bincount(minlength=24) > 0 for book in range(12)])
    assert used.float().mean() > 0.9


def test_forget() -> None:
    model, (x, classes) = trained_keys(), clusters()
    fit(model, x, classes)
    rest = classes != 3
    before = model(x[rest])
    count = model.forget(x[~rest])
    assert count == sum(len(codes.unique()) for codes in model.codes(x[~rest]).unbind(1))
    assert not model(x[~rest]).any(), "every value that the class hits is zero"
    assert (model(x[rest]).max(1).indices == before.max(1).indices).float().mean() > 0.9


def test_classifier_runs_on_pycores_search() -> None:
    model, (x, classes) = trained_keys(), clusters()
    with CalledOps() as called:
        functional.cross_entropy(model(x), classes).backward()
    assert (called.count("vq_encode"), called.count("rvq_decode")) == (1, 12 + 1)
    assert not called.torchs("cdist", "argmin", "argmax", "topk", "sort", "attention"), called.names


@pytest.mark.parametrize(
    "keywords, message",
    [({"books": 0}, "books is 0 and must be at least 1"), ({"least_hits": 1.0}, "least_hits is 1.0 and must be")],
)
def test_classifier_errors(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^BottleneckClassifier: {message}"):
        BottleneckClassifier(16, 6, **keywords)


def test_classifier_refuses_inputs() -> None:
    model = BottleneckClassifier(16, 6, books=2, keys=4, key_dim=2)
    for x in (torch.zeros(3, 15), torch.zeros(2, 3, 16), torch.zeros(3, 16, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"^BottleneckClassifier: x has shape .* and must have \[rows, 16\]"):
            model(x)
    with pytest.raises(TypeError, match="^BottleneckClassifier: x is a list"):
        model([1.0])
    with pytest.raises(ValueError, match="^BottleneckClassifier: epochs is 0 and must be at least 1"):
        model.learn_keys(torch.zeros(3, 16), epochs=0)


# ---- codebooks in a transformer --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare() -> Bytelm:
    torch.manual_seed(0)
    return Bytelm(BytelmConfig(dim=32, heads=4, kv_heads=2, mlp_ratio=2))


def tokens(batch: int = 2, length: int = 70) -> Tensor:
    drawn = torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(length))
    drawn[:, 0] = BOS
    return drawn


def coded(bare: Bytelm, **keywords: Any) -> nn.Module:
    torch.manual_seed(1)
    model = with_codebooks(bare, 40, **keywords)
    learn_codebooks(model, [tokens(), tokens(length=50)])
    return model


@torch.no_grad()
def test_codes_stand_for_what_heads_give(bare: Bytelm) -> None:
    before = {name: value.clone() for name, value in bare.state_dict().items()}
    model = coded(bare, k=2)
    model(tokens())
    layers = codebooks(model)
    assert len(layers) == 2 and all(layer.codes.shape == (2, 70, 4, 2) for layer in layers)
    assert all(torch.equal(value, before[name]) for name, value in bare.state_dict().items())
    # The first layer by hand: the heads' output of the bare model, its codes' mean, the bare model's projection.
    seen: list[Tensor] = []
    hook = bare.blocks[0].attention.out.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    bare(tokens())
    hook.remove()
    parts = functional.layer_norm(seen[0], (32,)).unflatten(-1, (4, 8))
    likeness = torch.einsum("bthd,hkd->bthk", parts, functional.normalize(layers[0].features.codebook, dim=-1))
    assert torch.equal(layers[0].codes, likeness.topk(2).indices)
    made = torch.stack([layers[0].features.codebook[h][layers[0].codes[:, :, h]].mean(2) for h in range(4)], dim=2)
    assert (made.flatten(2) - seen[0]).square().mean() < 0.5 * seen[0].square().mean()
    torch.testing.assert_close(layers[0](seen[0]), bare.blocks[0].attention.out(made.flatten(2)), rtol=1e-4, atol=1e-5)


def test_training_reaches_codes_and_weights(bare: Bytelm) -> None:
    model = coded(bare, k=2)
    logits = model(tokens())
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
    (loss + codebook_loss(model)).backward()
    assert torch.equal(codebook_loss(model), sum(layer.loss for layer in codebooks(model)))
    for name, parameter in model.named_parameters():
        if ".features.norm." not in name:  # it only turns the search
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in bare.parameters())


@torch.no_grad()
def test_switching_a_code_changes_what_follows(bare: Bytelm) -> None:
    model = coded(bare, k=1)
    plain = model(tokens())
    code = int(codebooks(model)[0].codes[0, 40, 2, 0])
    features = codebooks(model)[0].features
    features.switch_off(code, head=2)
    without = model(tokens())
    assert code not in codebooks(model)[0].codes[:, :, 2]
    assert not torch.equal(without[0, 40], plain[0, 40])
    features.reset()
    features.force(code, head=2)
    forced = model(tokens())
    assert (codebooks(model)[0].codes[:, :, 2] == code).all() and not torch.equal(forced, plain)
    features.reset()
    assert torch.equal(model(tokens()), plain)


@torch.no_grad()
@pytest.mark.usefixtures("isa")
def test_same_bits_on_a_cache(bare: Bytelm) -> None:
    """Coded or not: token by token, the logits of one pass."""
    model = coded(bare, k=2)
    whole = model(tokens(), schedule=Lambda(4, 32))
    caches = model.caches(Lambda(4, 32))
    parts = [model(tokens()[:, i : i + 1], caches=caches) for i in range(70)]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    assert torch.equal(model(tokens()[:1, :40], schedule=Lambda(4, 32))[0], whole[0, :40])


def test_transformer_runs_on_pycores_kernels(bare: Bytelm) -> None:
    model = coded(bare, k=2)
    with CalledOps() as called:
        (model(tokens()).sum() + codebook_loss(model)).backward()
    assert (called.count("attention"), called.count("vq_encode")) == (2, 2)
    assert called.count("rvq_decode") == 2 * 4 and called.count("invariant_linear") == 6 * 2 + 1
    assert not called.torchs("cdist", "argmin", "argmax", "topk", "sort", "attention", "softmax", "mm"), called.names


def test_codebook_errors(bare: Bytelm) -> None:
    with pytest.raises(ValueError, match="^with_codebooks: model is Linear without a SelfAttention and must have one$"):
        with_codebooks(nn.Linear(3, 3), 8)
    model = with_codebooks(bare, 40, k=1)
    with pytest.raises(ValueError, match="^with_codebooks: model has codebooks, and must have none yet$"):
        with_codebooks(model, 40)
    with pytest.raises(ValueError, match="^codebook_loss: model has seen no input through codebooks, and must have$"):
        codebook_loss(model)
    message = "^learn_codebooks: batches have 5 positions and must have at least the 40 codes of a head$"
    with pytest.raises(ValueError, match=message):
        learn_codebooks(model, [tokens(1, 5)])
    before = copy.deepcopy(model)
    assert torch.equal(model(tokens()), before(tokens())), "nothing is left of the failed attempt"

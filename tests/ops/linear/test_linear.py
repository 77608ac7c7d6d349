# SPDX-License-Identifier: Apache-2.0
"""invariant_linear and rms_norm: values, gradients, the same bits, torch's transforms, and what bad input gets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pycore
from pycore import ops, reference
from pycore.reference import linear as linear_reference

kernels = torch.ops.pycore

# (rows, K, N): empty, one, around the vector widths, the panel (64), the reduction block (256) and a primes' mix.
SHAPES = [
    (0, 17, 5), (1, 1, 1), (1, 17, 97), (1, 256, 128), (1, 1025, 339), (3, 97, 113), (6, 128, 64), (7, 257, 65),
    (17, 40, 1), (25, 300, 63), (97, 512, 130), (113, 111, 256), (339, 64, 97), (1023, 32, 33), (5, 3, 1025),
    (1025, 5, 193), (4, 0, 9), (9, 8, 0),
]  # fmt: skip
NORM_SHAPES = [(0, 8), (1, 2), (1, 17), (3, 64), (17, 63), (65, 65), (97, 128), (129, 339), (1023, 111), (2, 1025)]


def ids(shapes: list[tuple[int, ...]]) -> list[str]:
    return ["x".join(map(str, shape)) for shape in shapes]


def assert_as_accurate(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The rule of the design: at most twice plain torch's error, plus 4 ulp of the largest output."""
    assert actual.dtype == plain.dtype and actual.shape == plain.shape
    if actual.numel() == 0:
        return
    ulp = torch.finfo(actual.dtype).eps * float(exact.abs().max())
    error, allowed = (float((values.double() - exact).abs().max()) for values in (actual, plain))
    assert error <= 2 * allowed + 4 * ulp, f"error {error:.3g}, plain torch {allowed:.3g}, ulp {ulp:.3g}"


def linear_inputs(rows: int, k: int, n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, k, dtype=dtype), torch.randn(n, k, dtype=dtype), torch.randn(n, dtype=dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int64)


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=ids(SHAPES))
@pytest.mark.parametrize("with_bias", [False, True], ids=["no_bias", "bias"])
def test_linear_forward(isa: str, shape: tuple[int, int, int], with_bias: bool) -> None:
    x, weight, bias = linear_inputs(*shape)
    chosen = bias if with_bias else None
    exact = linear_reference.invariant_linear(x.double(), weight.double(), bias.double() if with_bias else None)
    assert_as_accurate(ops.invariant_linear(x, weight, chosen), F.linear(x, weight, chosen), exact)


@pytest.mark.parametrize("shape", SHAPES, ids=ids(SHAPES))
def test_linear_backward(isa: str, shape: tuple[int, int, int]) -> None:
    x, weight, _ = linear_inputs(*shape)
    grad = torch.randn(shape[0], shape[2])
    grad_x, grad_weight, grad_bias = kernels.invariant_linear_backward(grad, x, weight, True, True, True)
    exact = grad.double()
    assert_as_accurate(grad_x, grad @ weight, exact @ weight.double())
    assert_as_accurate(grad_weight, grad.T @ x, exact.T @ x.double())
    assert_as_accurate(grad_bias, grad.sum(0), exact.sum(0))


@pytest.mark.parametrize("shape", NORM_SHAPES, ids=ids(NORM_SHAPES))
@pytest.mark.parametrize("with_weight", [False, True], ids=["no_weight", "weight"])
def test_norm(isa: str, shape: tuple[int, int], with_weight: bool) -> None:
    x, weight, grad = torch.randn(shape) * 3, torch.randn(shape[1]), torch.randn(shape)
    chosen = weight if with_weight else None
    plain_x, exact_x = x.clone().requires_grad_(), x.double().requires_grad_()
    plain_weight, exact_weight = weight.clone().requires_grad_(), weight.double().requires_grad_()
    plain = linear_reference.rms_norm(plain_x, plain_weight if with_weight else None)
    exact = linear_reference.rms_norm(exact_x, exact_weight if with_weight else None)
    assert_as_accurate(ops.rms_norm(x, chosen), plain.detach(), exact.detach())

    plain.backward(grad)
    exact.backward(grad.double())
    grad_x, grad_weight = kernels.rms_norm_backward(grad, x, chosen, 1e-6, True, with_weight)
    assert_as_accurate(grad_x, plain_x.grad, exact_x.grad)
    if with_weight:
        assert_as_accurate(grad_weight, plain_weight.grad, exact_weight.grad)


def test_reference_is_torch() -> None:
    x, weight, bias = linear_inputs(5, 7, 3, torch.float64)
    torch.testing.assert_close(linear_reference.invariant_linear(x, weight, bias), F.linear(x, weight, bias))
    scale = torch.randn(7, dtype=torch.float64)
    torch.testing.assert_close(linear_reference.rms_norm(x, scale, 0.1), F.rms_norm(x, (7,), scale, eps=0.1))
    assert reference is not None


def test_nan_and_infinity_stay_in_their_row(isa: str) -> None:
    x, weight, _ = linear_inputs(9, 70, 33)
    clean = ops.invariant_linear(x, weight)
    x[4, 3], x[5, 3] = float("nan"), float("inf")
    for result, whole in ((ops.invariant_linear(x, weight), clean), (ops.rms_norm(x), None)):
        assert not result[4].isfinite().any()
        keep = [0, 1, 2, 3, 6, 7, 8]
        assert torch.equal(result[keep], ops.rms_norm(x[keep]) if whole is None else whole[keep])


# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(97, 300, 130), (50, 64, 64), (401, 17, 97)], ids=lambda shape: "x".join(map(str, shape))
)
def test_a_row_has_the_same_bits_in_any_company(isa: str, shape: tuple[int, int, int]) -> None:
    x, weight, bias = linear_inputs(*shape)
    scale, grad = torch.randn(shape[1]), torch.randn(shape[0], shape[2])
    functions: list[tuple[Callable[..., Tensor], Tensor]] = [
        (lambda rows: ops.invariant_linear(rows, weight, bias), x),
        (lambda rows: ops.rms_norm(rows, scale), x),
        (lambda rows: kernels.invariant_linear_backward(rows, x[: len(rows)], weight, True, False, False)[0], grad),
        (lambda rows: kernels.rms_norm_backward(rows, rows, scale, 1e-6, True, False)[0], x),
    ]
    for function, rows in functions:
        whole = function(rows)
        for count in (1, 2, 5, 6, 7, 12, 23, 24, 25, 48):
            for start in (0, 1, 13):
                part = function(rows[start : start + count])
                assert torch.equal(part, whole[start : start + count]), f"{count} rows from {start}"


def test_batch_shape_does_not_matter(isa: str) -> None:
    x, weight, bias = linear_inputs(64 * 9, 96, 70)
    batch = x.view(64, 3, 3, 96)
    assert torch.equal(ops.invariant_linear(batch, weight, bias).view(-1, 70), ops.invariant_linear(x, weight, bias))
    assert torch.equal(
        ops.invariant_linear(batch[5, 1, 1], weight, bias), ops.invariant_linear(x, weight, bias)[5 * 9 + 4]
    )
    assert torch.equal(ops.rms_norm(batch, bias.new_ones(96)).view(-1, 96), ops.rms_norm(x, bias.new_ones(96)))


@pytest.mark.parametrize("shape", [(700, 129, 300), (1, 600, 700)], ids=["many_rows", "one_row"])
def test_threads_do_not_matter(isa: str, threads: None, shape: tuple[int, int, int]) -> None:
    x, weight, bias = linear_inputs(*shape)
    scale, grad = torch.randn(shape[1]), torch.randn(shape[0], shape[2])

    def everything() -> list[Tensor]:
        return [
            ops.invariant_linear(x, weight, bias),
            *kernels.invariant_linear_backward(grad, x, weight, True, True, True),
            ops.rms_norm(x, scale),
            *kernels.rms_norm_backward(x + 1, x, scale, 1e-6, True, True),
        ]

    torch.set_num_threads(1)
    alone = everything()
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        for one, many in zip(alone, everything(), strict=True):
            assert torch.equal(one, many), f"{count} threads"


@pytest.mark.parametrize("shape", SHAPES, ids=ids(SHAPES))
def test_instruction_sets_agree(shape: tuple[int, int, int]) -> None:
    """The plain loops too: the order of summation is written down, and an FMA rounds once."""
    x, weight, bias = linear_inputs(*shape)
    scale, grad = torch.randn(shape[1]), torch.randn(shape[0], shape[2])
    before, results = pycore.native.cpu_isa(), []
    for name in pycore.native.available_isas():
        pycore.native.set_cpu_isa(name)
        results.append(
            [
                ops.invariant_linear(x, weight, bias),
                *kernels.invariant_linear_backward(grad, x, weight, True, True, True),
                ops.rms_norm(x, scale),
                *kernels.rms_norm_backward(x * 2, x, scale, 1e-6, True, True),
            ]
        )
    pycore.native.set_cpu_isa(before)
    for other in results[1:]:
        for expected, actual in zip(results[0], other, strict=True):
            assert torch.equal(expected, actual)


# ---- strides ---------------------------------------------------------------------------------------------------------


def strided_versions(x: Tensor) -> dict[str, Tensor]:
    """Views with the values of x [6, 4, K] and other strides."""
    wide = torch.randn(6, 4, 2 * x.shape[2] + 3)
    wide[..., 3 : 3 + x.shape[2]] = x
    return {
        "contiguous": x,
        "row_stride": wide[..., 3 : 3 + x.shape[2]],
        "transposed_batch": x.transpose(0, 1).contiguous().transpose(0, 1),
        "last_strided": x.transpose(1, 2).contiguous().transpose(1, 2),
        "every_other": torch.stack([x, -x], dim=1)[:, 0],
        "negative_free_view": torch.cat([x, x])[6:],
    }


@pytest.mark.parametrize("which", list(strided_versions(torch.zeros(6, 4, 5))))
def test_strides(isa: str, which: str) -> None:
    x, weight, scale = torch.randn(6, 4, 70), torch.randn(33, 70), torch.randn(70)
    grad = torch.randn(6, 4, 33)
    strided, grad_strided = strided_versions(x)[which], strided_versions(grad)[which]
    weight_strided = torch.randn(33, 100)
    weight_strided[:, 7:77] = weight
    assert torch.equal(strided, x)
    for w in (weight, weight_strided[:, 7:77], weight.T.contiguous().T):
        assert torch.equal(ops.invariant_linear(strided, w), ops.invariant_linear(x, weight))
        actual = kernels.invariant_linear_backward(grad_strided, strided, w, True, True, True)
        expected = kernels.invariant_linear_backward(grad, x, weight, True, True, True)
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert torch.equal(ops.rms_norm(strided, scale), ops.rms_norm(x, scale))
    actual = kernels.rms_norm_backward(strided, strided, scale, 1e-6, True, True)
    assert all(
        torch.equal(a, e) for a, e in zip(actual, kernels.rms_norm_backward(x, x, scale, 1e-6, True, True), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("rows", [1, 2, 6, 13])
def test_how_weights_lie_and_how_long_they_are(isa: str, rows: int, dtype: torch.dtype) -> None:
    """Few rows fetch weights without gaps in another order than others, and than those too long for it."""
    for k, n in [(93, 70), (576, 33), (20_000, 20)]:
        x, weight = torch.randn(rows, k).to(dtype), torch.randn(n, k + 5).to(dtype)[:, :k]
        out = ops.invariant_linear(x, weight)
        assert torch.equal(out, ops.invariant_linear(x, weight.contiguous()))
        one_by_one = [ops.invariant_linear(x, weight[i : i + 1].contiguous()) for i in range(n)]
        assert torch.equal(out, torch.cat(one_by_one, dim=1))


def test_a_call_leaves_autograd_as_it_was() -> None:
    """Where nothing is recorded a call passes autograd by, for its own length and whatever comes of it."""
    x, weight = torch.randn(2, 8), torch.randn(3, 8)
    with torch.no_grad():
        plain = ops.invariant_linear(x.requires_grad_(), weight)
        assert not plain.requires_grad
        with pytest.raises(ValueError, match="features in its last dimension"):
            ops.invariant_linear(x, weight[:, 1:])
    assert ops.invariant_linear(x, weight).requires_grad
    with torch.inference_mode():
        inferred = ops.invariant_linear(x, weight)
        assert inferred.is_inference() and torch.equal(inferred, plain)
        with torch.inference_mode(False), torch.no_grad():
            assert not ops.invariant_linear(x, weight).is_inference()
    assert (x.detach() * 2).requires_grad_().sum().requires_grad and ops.invariant_linear(x, weight).requires_grad


def test_expanded(isa: str) -> None:
    row, weight, scale = torch.randn(1, 70), torch.randn(33, 70), torch.randn(70)
    x = row.expand(9, 70)
    assert torch.equal(ops.invariant_linear(x, weight), ops.invariant_linear(row, weight).expand(9, 33))
    assert torch.equal(ops.rms_norm(x, scale), ops.rms_norm(row, scale).expand(9, 70))
    bias = torch.tensor(2.0).expand(33)
    assert torch.equal(ops.invariant_linear(x, weight, bias), ops.invariant_linear(x, weight, bias.contiguous()))
    ones = torch.tensor(1.0).expand(9, 33)  # what sum().backward() hands over
    actual = kernels.invariant_linear_backward(ones, x, weight, True, True, True)
    expected = kernels.invariant_linear_backward(ones.contiguous(), x.contiguous(), weight, True, True, True)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_one_dimension_and_empty() -> None:
    x, weight, _ = linear_inputs(1, 12, 5)
    assert torch.equal(ops.invariant_linear(x[0], weight), ops.invariant_linear(x, weight)[0])
    assert torch.equal(ops.rms_norm(x[0]), ops.rms_norm(x)[0])
    assert ops.invariant_linear(torch.empty(2, 0, 12), weight).shape == (2, 0, 5)
    assert ops.invariant_linear(x, torch.empty(0, 12)).shape == (1, 0)
    assert torch.equal(ops.invariant_linear(torch.empty(3, 0), torch.empty(5, 0)), torch.zeros(3, 5))
    assert ops.rms_norm(torch.empty(3, 0), torch.empty(0)).shape == (3, 0)
    grads = kernels.invariant_linear_backward(torch.empty(0, 5), torch.empty(0, 12), weight, True, True, True)
    assert [tuple(grad.shape) for grad in grads] == [(0, 12), (5, 12), (5,)]
    assert not grads[1].any() and not grads[2].any()
    assert not kernels.rms_norm_backward(torch.empty(0, 4), torch.empty(0, 4), torch.ones(4), 0.1, True, True)[1].any()


# ---- gradients and torch's transforms --------------------------------------------------------------------------------


def test_gradcheck() -> None:
    double = {"dtype": torch.float64, "requires_grad": True}
    x, weight, bias = torch.randn(2, 3, 5, **double), torch.randn(4, 5, **double), torch.randn(4, **double)
    assert torch.autograd.gradcheck(ops.invariant_linear, (x, weight, bias))
    assert torch.autograd.gradcheck(ops.invariant_linear, (x, weight))
    scale = torch.randn(5, **double)
    assert torch.autograd.gradcheck(ops.rms_norm, (x, scale, 0.1))
    assert torch.autograd.gradcheck(ops.rms_norm, (x, None, 0.1))


def test_only_wanted_gradients_are_computed() -> None:
    x, weight, bias = linear_inputs(4, 6, 5)
    weight.requires_grad_()
    ops.invariant_linear(x, weight, bias).sum().backward()
    assert x.grad is None and bias.grad is None
    torch.testing.assert_close(weight.grad, x.sum(0).expand(5, 6))
    assert [
        grad.numel() for grad in kernels.invariant_linear_backward(x[:, :5], x, weight.detach(), False, True, False)
    ] == [0, 30, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_opcheck(dtype: torch.dtype) -> None:
    x, weight, bias = (tensor.requires_grad_() for tensor in linear_inputs(4, 6, 5, dtype))
    scale = torch.randn(6, dtype=dtype, requires_grad=True)
    torch.library.opcheck(kernels.invariant_linear, (x, weight, bias))
    torch.library.opcheck(kernels.invariant_linear, (x.view(2, 2, 6).transpose(0, 1), weight, None))
    torch.library.opcheck(kernels.rms_norm, (x, scale, 1e-6))
    torch.library.opcheck(kernels.rms_norm, (x, None, 1e-6))
    x, weight, scale = x.detach(), weight.detach(), scale.detach()
    for need in ((True, True, True), (True, False, False), (False, True, True)):
        torch.library.opcheck(kernels.invariant_linear_backward, (x[:, :5].contiguous(), x, weight, *need))
    torch.library.opcheck(kernels.rms_norm_backward, (x, x, scale, 1e-6, True, True))
    torch.library.opcheck(kernels.rms_norm_backward, (x, x, None, 1e-6, True, False))


def layer(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    return ops.invariant_linear(ops.rms_norm(x, scale), weight, bias)


def test_compile_with_a_changing_row_count() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    _, weight, bias = (tensor.requires_grad_() for tensor in linear_inputs(1, 6, 5))
    scale = torch.randn(6, requires_grad=True)
    for rows in (4, 7, 12, 33, 100):
        x = torch.randn(2, rows, 6)
        out = compiled(x, weight, bias, scale)
        assert torch.equal(out, layer(x, weight, bias, scale))
        expected = torch.autograd.grad(layer(x, weight, bias, scale).square().sum(), (weight, bias, scale))
        for a, e in zip(torch.autograd.grad(out.square().sum(), (weight, bias, scale)), expected, strict=True):
            assert torch.equal(a, e)
    assert counter.frame_count <= 2


def test_export_with_a_dynamic_batch() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
            return layer(x, weight, bias, scale)

    args = (torch.randn(4, 6), *linear_inputs(1, 6, 5)[1:], torch.randn(6))
    program = torch.export.export(Layer(), args, dynamic_shapes=({0: torch.export.Dim("rows")}, None, None, None))
    x = torch.randn(11, 6)
    assert torch.equal(program.module()(x, *args[1:]), layer(x, *args[1:]))


def test_autocast_computes_in_float32() -> None:
    x, weight, bias = linear_inputs(4, 6, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.invariant_linear(x, weight, bias), kernels.invariant_linear(x, weight, bias))
        assert ops.invariant_linear(x.bfloat16(), weight).dtype == torch.float32
        assert ops.rms_norm(x.bfloat16()).dtype == torch.float32


def test_vmap() -> None:
    x, weight, bias = torch.randn(3, 4, 6), torch.randn(5, 6), torch.randn(5)
    weights, scales = torch.randn(3, 5, 6), torch.randn(3, 6)
    assert torch.equal(
        torch.vmap(ops.invariant_linear, (0, None, None))(x, weight, bias), ops.invariant_linear(x, weight, bias)
    )
    by_column = torch.vmap(ops.invariant_linear, (1, None))(x, weight)
    assert torch.equal(by_column, ops.invariant_linear(x, weight).transpose(0, 1))
    each = torch.stack([ops.invariant_linear(a, b) for a, b in zip(x, weights, strict=True)])
    assert torch.equal(torch.vmap(ops.invariant_linear)(x, weights), each)
    each = torch.stack([ops.rms_norm(a, b) for a, b in zip(x, scales, strict=True)])
    assert torch.equal(torch.vmap(ops.rms_norm)(x, scales), each)
    assert torch.equal(torch.vmap(ops.rms_norm)(x), ops.rms_norm(x))


def test_batched_gradients() -> None:
    x, weight, bias = (tensor.requires_grad_() for tensor in linear_inputs(4, 6, 5))
    scale = torch.randn(6, requires_grad=True)
    out, grads = layer(x, weight, bias, scale), torch.randn(3, 4, 5)
    batched = torch.autograd.grad(out, (x, weight, bias, scale), grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        each = torch.autograd.grad(out, (x, weight, bias, scale), grad, retain_graph=True)
        assert all(torch.equal(a[i], e) for a, e in zip(batched, each, strict=True))


# ---- the pybind11 face -----------------------------------------------------------------------------------------------


def test_native_is_the_same_kernel() -> None:
    x, weight, bias = linear_inputs(9, 70, 33)
    scale, grad = torch.randn(70), torch.randn(9, 33)
    native = pycore.native
    arrays = [tensor.numpy() for tensor in (x, weight, bias)]
    expected = ops.invariant_linear(x, weight, bias)
    assert torch.equal(torch.from_numpy(native.invariant_linear(*arrays, threads=2)), expected)
    out = torch.empty(9, 33)
    assert native.invariant_linear(x, weight, bias, out=out) is out
    assert torch.equal(out, expected)
    assert torch.equal(torch.from_numpy(native.rms_norm(x[:, ::1], scale)), ops.rms_norm(x, scale))
    for actual, wanted in (
        (native.invariant_linear_backward(grad, x, weight), (grad, x, weight, True, True, True)),
        (native.invariant_linear_backward(grad, x, weight, need_x=False), (grad, x, weight, False, True, True)),
    ):
        for a, w in zip(actual, kernels.invariant_linear_backward(*wanted), strict=True):
            assert a is None and w.numel() == 0 or torch.equal(torch.from_numpy(a), w)
    wanted = kernels.rms_norm_backward(x, x, scale, 1e-6, True, True)
    for a, w in zip(native.rms_norm_backward(x, x, scale), wanted, strict=True):
        assert torch.equal(torch.from_numpy(a), w)
    with pytest.raises(
        ValueError, match="invariant_linear: x has stride 2 in its last dimension, which must be contig"
    ):
        native.invariant_linear(arrays[0][:, ::2], arrays[1][:, :35])
    with pytest.raises(ValueError, match=r"rms_norm: out has shape \[9, 33\] and must have \[9, 70\]"):
        native.rms_norm(x, out=out)


# ---- what bad input gets ---------------------------------------------------------------------------------------------

X, W, B = torch.zeros(4, 6), torch.zeros(5, 6), torch.zeros(5)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: ops.invariant_linear([1.0], W), TypeError, "invariant_linear: x is a list and must be a Tensor"),
        (lambda: ops.invariant_linear(X, W, 1.0), TypeError, "bias is a float and must be a Tensor or None"),
        (lambda: ops.invariant_linear(X.half(), W), ValueError, "weight has dtype float32 and must have x's float16"),
        (lambda: ops.invariant_linear(X, W.bfloat16()), ValueError, "weight has dtype bfloat16 and must"),
        (lambda: ops.invariant_linear(X, W, B.double()), ValueError, "bias has dtype float64 and must have x's"),
        (
            lambda: ops.invariant_linear(X.long(), W), ValueError,
            "x has dtype int64 and must have float32, bfloat16, float16 or float64$",
        ),
        (lambda: ops.invariant_linear(X[:, :5], W), ValueError, "x has 5 features in its last dimension and"),
        (lambda: ops.invariant_linear(torch.tensor(1.0), W), ValueError, "x is a scalar"),
        (lambda: ops.invariant_linear(X, B), ValueError, r"weight has shape \[5\] and must be \[out_features, "),
        (lambda: ops.invariant_linear(X, W, B[:4]), ValueError, r"bias has shape \[4\] and must have \[5\]"),
        (
            lambda: kernels.invariant_linear_backward(X, X, W, True, True, True),
            ValueError,
            r"grad_out has shape \[4, 6\] and must have \[4, 5\]",
        ),
        (lambda: ops.rms_norm(None), TypeError, "rms_norm: x is a NoneType and must be a Tensor"),
        (lambda: ops.rms_norm(X, 2), TypeError, "weight is a int and must be a Tensor or None"),
        (lambda: ops.rms_norm(X, B), ValueError, r"weight has shape \[5\] and must have \[6\], x's last dimension"),
        (lambda: ops.rms_norm(X, eps=-1.0), ValueError, "eps is -1 and must be finite and not negative"),
        (lambda: ops.rms_norm(X, eps=float("nan")), ValueError, "eps is nan"),
        (lambda: ops.rms_norm(torch.tensor(1.0)), ValueError, "x is a scalar"),
        (lambda: ops.rms_norm(X.bfloat16(), X[0]), ValueError, "weight has dtype float32 and must have x's bfloat16"),
    ],
)  # fmt: skip
def test_errors(call: Callable[[], Tensor], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        call()

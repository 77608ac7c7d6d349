# SPDX-License-Identifier: Apache-2.0
"""Decoding on the quantized caches of onnxruntime and OpenVINO, where they are installed.

Each quantizes the keys and values it is given in its own way: onnxruntime's GroupQueryAttention with a scale for each
channel, which the caller computes; OpenVINO's scaled dot product attention with a range for each token.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

Prepare = Callable[[Any], Callable[[], Any]]


def available(bits: int) -> dict[str, Prepare]:
    """Contenders with caches of 8 or 4 bits, by name; those whose package is not installed are absent."""
    found: dict[str, Prepare] = {}
    if all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnx")):
        found[f"onnxruntime int{bits}"] = lambda x: _onnxruntime(x, bits)
    if bits == 8 and importlib.util.find_spec("openvino"):
        found["OpenVINO u8"] = _openvino
    return found


def missing() -> list[str]:
    """Packages that would add contenders."""
    return [name for name in ("onnxruntime", "onnx", "openvino") if not importlib.util.find_spec(name)]


def _onnxruntime(tensors: Any, bits: int) -> Callable[[], Any]:
    """tensors: query, key and value; the whole cache is one buffer that the newest token is written into."""
    import numpy
    import onnxruntime
    from onnx import TensorProto, helper

    query, key, value = (x.float().numpy() for x in tensors)
    heads, kv_heads, length, width = query.shape[1], *key.shape[1:]
    code, channels = (TensorProto.INT8, width) if bits == 8 else (TensorProto.UINT8, width // 2)
    number, count = TensorProto.FLOAT, TensorProto.INT32

    def typed(name: str, kind: Any, shape: list[Any]) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    past = ["b", kv_heads, "p", channels]
    inputs = [
        typed("query", number, ["b", "s", heads * width]),
        *(typed(name, number, ["b", "s", kv_heads * width]) for name in ("key", "value")),
        *(typed(name, code, past) for name in ("past_key", "past_value")),
        typed("seqlens_k", count, ["b"]),
        typed("total", count, []),
        *(typed(name, number, [1, kv_heads, 1, width]) for name in ("k_scale", "v_scale")),
    ]
    node = helper.make_node(
        "GroupQueryAttention",
        [*(x.name for x in inputs[:7]), "", "", "", "", "", "k_scale", "v_scale"],
        ["out", "present_key", "present_value"],
        domain="com.microsoft", num_heads=heads, kv_num_heads=kv_heads, k_quant_type="PER_CHANNEL",
        v_quant_type="PER_CHANNEL", kv_cache_bit_width=bits,
    )  # fmt: skip
    outputs = [
        typed("out", number, ["b", "s", heads * width]),
        *(typed(name, code, ["b", kv_heads, "t", channels]) for name in ("present_key", "present_value")),
    ]
    graph = helper.make_graph([node], "decode", inputs, outputs)
    versions = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    # Its threads wait for the next call by spinning, on the cores of whoever has the next turn; within a call they may.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model = helper.make_model(graph, opset_imports=versions, ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    most = 2 ** (bits - 1) - 1
    feeds: dict[str, Any] = {
        "query": query.reshape(1, 1, -1), "seqlens_k": numpy.array([length - 1], numpy.int32),
        "total": numpy.array(length, numpy.int32),
    }  # fmt: skip
    binding = session.io_binding()
    binding.bind_output("out")  # first, as outputs come in the order in which they are bound
    for name, x in (("key", key), ("value", value)):
        feeds[name] = x[:, :, -1:].transpose(0, 2, 1, 3).reshape(1, 1, -1)
        scale = numpy.abs(x).max(2, keepdims=True) / most
        feeds[f"{name[0]}_scale"] = scale
        codes = numpy.clip(numpy.round(x / scale), -most - 1, most).astype(numpy.int8)
        if bits == 4:
            nibbles = (codes + 8).astype(numpy.uint8)
            codes = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
        held = onnxruntime.OrtValue.ortvalue_from_numpy(numpy.ascontiguousarray(codes))
        binding.bind_ortvalue_input(f"past_{name}", held)
        binding.bind_ortvalue_output(f"present_{name}", held)
    for name, x in feeds.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(numpy.ascontiguousarray(x)))

    def step() -> Any:
        session.run_with_iobinding(binding)
        return (torch.from_numpy(binding.get_outputs()[0].numpy()).view(1, heads, 1, width),)

    return step


def _openvino(tensors: Any) -> Callable[[], Any]:
    """A stateful model whose cache the plugin keeps in u8. Each call takes the newest token in once more."""
    import numpy
    import openvino
    from openvino import opset6, opset13

    query, key, value = (x.float().numpy() for x in tensors)
    heads, kv_heads, length, width = query.shape[1], *key.shape[1:]

    def numbers(*values: int) -> Any:
        return opset13.constant(numpy.array(values, numpy.int64))

    def scalar(x: Any) -> Any:
        return opset13.constant(numpy.array(x, numpy.int64))

    asked = opset13.parameter([-1, heads, -1, width], numpy.float32, name="query")
    fresh = [opset13.parameter([-1, kv_heads, -1, width], numpy.float32, name=name) for name in ("key", "value")]
    beams = opset13.parameter([-1], numpy.int32, name="beams")
    mask = opset13.parameter([-1, -1, -1, -1], numpy.float32, name="mask")
    kept, repeated = [], []
    for x in fresh:
        name = f"past_{x.get_friendly_name()}"
        batch = opset13.gather(opset13.shape_of(beams, output_type="i64"), numbers(0), scalar(0))
        shape = opset13.concat([batch, numbers(kv_heads, 0, width)], 0)
        empty = opset13.broadcast(opset13.constant(numpy.array(0, numpy.float32)), shape)
        past = opset6.read_value(empty, name, openvino.Type.f32, openvino.PartialShape([-1, kv_heads, -1, width]))
        both = opset13.concat([opset13.gather(past, beams, scalar(0)), x], 2)
        kept.append(opset6.assign(both, name))
        wide = opset13.broadcast(
            opset13.unsqueeze(both, scalar(2)), numbers(1, 1, heads // kv_heads, 1, 1), None, "BIDIRECTIONAL"
        )
        repeated.append(opset13.reshape(wide, numbers(0, heads, -1, width), True))
    out = opset13.result(opset13.scaled_dot_product_attention(asked, *repeated, mask, causal=False))
    model = openvino.Model([out], kept, [asked, *fresh, beams, mask], "decode")
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(), "KV_CACHE_PRECISION": "u8", "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # it would pin the caller too, and slow down whoever has the next turn
        "INFERENCE_PRECISION_HINT": "f32",
    }  # fmt: skip
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    row = numpy.zeros(1, numpy.int32)

    def feed(tokens: slice, seen: int) -> None:
        parts = (key[:, :, tokens], value[:, :, tokens])
        mask = numpy.zeros((1, 1, 1, seen), numpy.float32)
        mask[..., length:] = -numpy.inf  # the newest token's copies of earlier calls
        request.infer({"query": query, "key": parts[0], "value": parts[1], "beams": row, "mask": mask})

    feed(slice(0, 1), 1)
    for state in request.query_state():
        held = key if "past_key" in state.name else value
        state.state = openvino.Tensor(numpy.ascontiguousarray(held[:, :, : length - 1]))
    seen = length - 1

    def step() -> Any:
        nonlocal seen
        seen += 1
        feed(slice(length - 1, length), seen)
        return (torch.from_numpy(request.get_output_tensor(0).data.copy()),)

    return step

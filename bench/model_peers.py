# SPDX-License-Identifier: Apache-2.0
"""What runs SmolLM2 outside of torch: onnxruntime with its GroupQueryAttention, and llama.cpp.

Both are given the weights that the other contenders share, in the same dtype, and write into caches whose room is made
before. Neither package is needed: `absent` names those that are missing.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Takes tokens [1, n] and the position of the first, returns the logits after the last of them.
Reader = Callable[[torch.Tensor, int], torch.Tensor]


def absent() -> list[str]:
    """The packages that are not there, of those that `makers` asks for."""
    return [name for name in ("onnxruntime", "onnx", "llama_cpp", "gguf") if importlib.util.find_spec(name) is None]


def makers(dtype: torch.dtype) -> dict[str, Callable[[Any, int], Reader]]:
    """By name, what makes a reader of a model with room for so many tokens, where its packages are."""
    found: dict[str, Callable[[Any, int], Reader]] = {}
    missing = absent()
    if dtype == torch.float32 and not {"onnxruntime", "onnx"} & set(missing):  # its attention takes no bfloat16 here
        found["onnxruntime GroupQueryAttention"] = onnx_reader
    if not {"llama_cpp", "gguf"} & set(missing):
        found["llama.cpp"] = llama_reader
    return found


# ---- onnxruntime -----------------------------------------------------------------------------------------------------


def _graph(model: Any, room: int) -> Any:
    """The model as ONNX: logits of the last token, and the caches."""
    from onnx import TensorProto, helper, numpy_helper

    config, nodes, weights = model.config, [], []
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def weight(name: str, value: torch.Tensor) -> str:
        weights.append(numpy_helper.from_array(value.detach().contiguous().numpy(), name))
        return name

    def node(kind: str, inputs: list[str], *outputs: str, domain: str = "", **options: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, list(outputs), domain=domain, **options))
        return outputs[0]

    def product(x: str, name: str, linear: Any) -> str:
        return node("MatMul", [x, weight(f"{name}.weight", linear.weight.T)], name)

    position = torch.arange(room)[None]
    cos, sin = model.model.rotary_emb(torch.zeros(1, 1, 1), position)
    half = dim // 2
    tables = [weight("cos", cos[0, :, :half]), weight("sin", sin[0, :, :half])]
    x = node("Gather", [weight("embedding", model.model.embed_tokens.weight), "ids"], "x")
    eps = {"epsilon": config.rms_norm_eps}
    first = weight("first.weight", model.model.layers[0].input_layernorm.weight)
    normed = node("SimplifiedLayerNormalization", [x, first], "first", axis=-1, **eps)

    def add_norm(x: str, more: str, name: str, norm: Any) -> tuple[str, str]:
        node("SkipSimplifiedLayerNormalization", [x, more, weight(f"{name}.weight", norm.weight)], f"{name}.normed", "",
             "", f"{name}.sum", domain="com.microsoft", **eps)  # fmt: skip
        return f"{name}.sum", f"{name}.normed"

    for i, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        made = [product(normed, f"{i}.{name}", getattr(attention, f"{name}_proj")) for name in ("q", "k", "v")]
        inputs = [*made, f"past.{i}.key", f"past.{i}.value", "last", "total", *tables]
        out = node("GroupQueryAttention", inputs, f"{i}.attended", f"present.{i}.key", f"present.{i}.value",
                   domain="com.microsoft", num_heads=heads, kv_num_heads=kv_heads, do_rotary=1,
                   scale=float(attention.scaling))  # fmt: skip
        x, normed = add_norm(x, product(out, f"{i}.o", attention.o_proj), f"{i}.after", layer.post_attention_layernorm)
        gate, up = product(normed, f"{i}.gate", mlp.gate_proj), product(normed, f"{i}.up", mlp.up_proj)
        silu = node("Mul", [gate, node("Sigmoid", [gate], f"{i}.sigmoid")], f"{i}.silu")
        gated = node("Mul", [silu, up], f"{i}.gated")
        after = model.model.layers[i + 1].input_layernorm if i + 1 < len(model.model.layers) else model.model.norm
        x, normed = add_norm(x, product(gated, f"{i}.down", mlp.down_proj), f"{i}.end", after)
    newest = node("Gather", [normed, weight("newest.index", torch.tensor([-1]))], "newest", axis=1)
    product(newest, "logits", model.lm_head)
    values = [helper.make_tensor_value_info("ids", TensorProto.INT64, [1, "n"]),
              helper.make_tensor_value_info("last", TensorProto.INT32, [1]),
              helper.make_tensor_value_info("total", TensorProto.INT32, [])]  # fmt: skip
    results = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 1, config.vocab_size])]
    for i in range(len(model.model.layers)):
        for name in ("key", "value"):
            shape = [1, kv_heads, room, dim]
            values.append(helper.make_tensor_value_info(f"past.{i}.{name}", TensorProto.FLOAT, shape))
            results.append(helper.make_tensor_value_info(f"present.{i}.{name}", TensorProto.FLOAT, shape))
    graph = helper.make_graph(nodes, "model", values, results, weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@torch.no_grad()
def onnx_reader(model: Any, room: int) -> Reader:
    """The fused operators of onnxruntime on torch's number of threads; keys and values are written in place."""
    import numpy as np
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    # Its threads wait for the next call by spinning, on the cores of whoever has the next turn; within a call they may.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        _graph(model, room).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    config, value_of = model.config, onnxruntime.OrtValue.ortvalue_from_numpy
    shape = (1, config.num_key_value_heads, room, config.head_dim)
    held = {f"{i}.{name}": value_of(np.zeros(shape, np.float32))
            for i in range(config.num_hidden_layers) for name in ("key", "value")}  # fmt: skip

    def read(ids: torch.Tensor, at: int) -> torch.Tensor:
        binding, total = session.io_binding(), at + ids.shape[1]
        binding.bind_cpu_input("ids", ids.contiguous().numpy())
        binding.bind_cpu_input("last", np.array([total - 1], np.int32))
        binding.bind_cpu_input("total", np.array(total, np.int32))
        for name, value in held.items():
            binding.bind_ortvalue_input(f"past.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        binding.bind_output("logits", "cpu")
        session.run_with_iobinding(binding)
        return torch.from_numpy(binding.get_outputs()[-1].numpy())[0, 0]

    return read


# ---- llama.cpp -------------------------------------------------------------------------------------------------------


BF16 = 30  # GGML_TYPE_BF16, which the Python package does not name
_folder = tempfile.TemporaryDirectory(prefix="bench_model_")  # goes with the process


@functools.cache
def _gguf(source: Any) -> str:
    """The file of the model's weights in its dtype, norms in float32, as llama.cpp has them."""
    import gguf

    model, config = source.model, source.config
    dtype = source.dtype
    path = str(Path(_folder.name) / f"{id(source)}.gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, value: torch.Tensor) -> None:
        value = value.detach()
        if dtype == torch.bfloat16 and value.dim() == 2:
            raw = value.bfloat16().contiguous().view(torch.uint16).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, value.float().contiguous().numpy())

    def turned(weight: torch.Tensor, heads: int) -> torch.Tensor:
        """Rows of a head as llama.cpp pairs them: (2i, 2i + 1) in place of (i, i + half)."""
        return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    add("token_embd.weight", model.embed_tokens.weight)
    add("output_norm.weight", model.norm.weight)
    if not config.tie_word_embeddings:
        add("output.weight", source.lm_head.weight)
    for i, layer in enumerate(model.layers):
        attention, mlp, block = layer.self_attn, layer.mlp, f"blk.{i}"
        add(f"{block}.attn_norm.weight", layer.input_layernorm.weight)
        add(f"{block}.attn_q.weight", turned(attention.q_proj.weight, config.num_attention_heads))
        add(f"{block}.attn_k.weight", turned(attention.k_proj.weight, config.num_key_value_heads))
        add(f"{block}.attn_v.weight", attention.v_proj.weight)
        add(f"{block}.attn_output.weight", attention.o_proj.weight)
        add(f"{block}.ffn_norm.weight", layer.post_attention_layernorm.weight)
        for name in ("gate", "up", "down"):
            add(f"{block}.ffn_{name}.weight", getattr(mlp, f"{name}_proj").weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama_reader(model: Any, room: int) -> Reader:
    """The reader of llama.cpp on torch's number of threads; keys and values in the weights' dtype."""
    import llama_cpp as lib

    _silence(lib)
    lib.llama_backend_init()
    loaded = lib.llama_model_load_from_file(_gguf(model).encode(), lib.llama_model_default_params())
    options, vocab = lib.llama_context_default_params(), model.config.vocab_size
    options.n_ctx = options.n_batch = room
    options.n_threads = options.n_threads_batch = torch.get_num_threads()
    options.type_k = options.type_v = lib.GGML_TYPE_F32 if model.dtype == torch.float32 else BF16
    if model.dtype == torch.float32:
        options.flash_attn_type = 0  # its flash attention rounds to float16
    context = lib.llama_init_from_model(loaded, options)
    if not context:
        raise RuntimeError("llama.cpp does not take the model")

    def read(ids: torch.Tensor, at: int) -> torch.Tensor:
        tokens = (lib.llama_token * ids.shape[1])(*ids[0].tolist())
        lib.llama_memory_seq_rm(lib.llama_get_memory(context), 0, at, -1)
        if lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(tokens))):
            raise RuntimeError("llama.cpp did not decode")
        logits = lib.llama_get_logits_ith(context, -1)
        return torch.tensor(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * vocab)).contents)

    return read


@functools.cache
def _silence(lib: Any) -> None:
    callback = lib.llama_log_callback(lambda *_: None)
    lib.llama_log_set(callback, ctypes.c_void_p(0))
    _kept.append(callback)


_kept: list[Any] = []  # what C calls as long as the process lives

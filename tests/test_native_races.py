# SPDX-License-Identifier: Apache-2.0
"""What another thread changes during a call changes no memory that is not the call's.

Each test runs in a process of its own, which would die of what it looks for: one thread calls, the main one flips a
setting or an array of indices between a good value and one that leads far away.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

HARNESS = """
import sys, threading, time
import numpy as np, torch
import pycore
from pycore import native, ops

torch.manual_seed(0)
FAR = 2**40

def race(call, flip, seconds=0.5):
    done, wrong = [], []
    def work():
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                call()
            except (ValueError, IndexError) as error:  # the bad value, seen in time
                wrong.append(error)
        done.append(True)
    worker = threading.Thread(target=work)
    worker.start()
    while not done:
        flip()
    worker.join()

def flipping(array, at, good, bad):
    def flip():
        for _ in range(50):
            array[at] = bad
            array[at] = good
    return flip

q = torch.randn(1, 2, 64, 16)
k = torch.randn(1, 2, 256, 16)
"""

RACES = {
    "lengths": """
n = np.array([256])
race(lambda: native.attention(q, k, k, key_lengths=n, threads=1), flipping(n, 0, 256, FAR))
""",
    "lengths of the torch face": """
n = torch.tensor([256])
race(lambda: ops.attention(q, k, k, key_lengths=n), flipping(n.numpy(), 0, 256, FAR))
""",
    "starts, offsets and queries": """
for name, good, bad in (("key_starts", 0, -FAR), ("key_offset", 0, -FAR), ("query_lengths", 64, FAR)):
    n = np.array([good])
    race(lambda: native.attention(q, k, k, threads=1, **{name: n}), flipping(n, 0, good, bad), 0.4)
""",
    "gradients": """
n = np.array([256])
out, lse = native.attention(q, k, k, key_lengths=n)
race(lambda: native.attention_backward(q, None, out, lse, q, k, k, key_lengths=n, threads=2), flipping(n, 0, 256, FAR))
""",
    "one query on two threads": """
n, one, many = np.array([9000]), torch.randn(1, 1, 1, 16), torch.randn(1, 1, 9000, 16)
race(lambda: native.attention(one, many, many, key_lengths=n, threads=2), flipping(n, 0, 9000, 1))
""",
    "bits of blocks": """
seed, none = np.array([1]), np.array(0)
one, many = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 40000, 16)
blocks, _ = native.attention_blocks(
    seed=seed, round=none, batch=1, heads=1, query_length=1, key_length=40000, family="constant", parameter=1.0
)
def flip():
    for _ in range(20):
        blocks[:] = 0
        blocks[:] = -1
race(lambda: native.attention(
    one, many, many, schedule="blocks", schedule_args=[64, 0, 1], schedule_tensor=blocks, threads=4), flip)
""",
    "boundaries": """
n = np.array([0, 40, 100, 256])
race(lambda: native.attention(
    q, k, k, schedule="segments", schedule_args=[0], schedule_tensor=n, threads=1), flipping(n, 1, 40, FAR))
""",
    "nodes of a tree": """
from pycore import schedules
tree = np.array([[[-1, 0, 1], [0, 1, 3], [1, 2, 7]]])
cos = torch.randn(256, 8)
race(lambda: native.attention(
    q[:, :, :3], k, k, schedule="tree", schedule_tensor=tree, rope_cos=cos, rope_sin=cos, threads=1),
    flipping(tree, (0, 2, 1), 2, FAR))
""",
    "blocks' lengths": """
n, seed, none = np.array([5000]), np.array([1]), np.array(0)
race(lambda: native.attention_blocks(
    seed=seed, round=none, batch=1, heads=2, query_length=300, key_length=5000, family="constant", parameter=0.5,
    blocks_per_row=3, key_lengths=n, threads=1), flipping(n, 0, 5000, FAR))
""",
    "lengths of a cache": """
keys, n, new = np.zeros((1, 1, 68, 8), np.float32), np.array([0]), np.ones((1, 1, 3, 8), np.float32)
race(lambda: native.lambda_cache_append(keys, keys.copy(), n, new, new, sink_size=4, threads=1),
     flipping(n, 0, 0, -FAR))
""",
    "offsets of streams": """
cdf = native.quantize_cdf(np.ones(16))
data, offsets = native.ac_encode(np.arange(4000).reshape(8, 500) % 16, cdf)
race(lambda: native.ac_decode(data, offsets, cdf, threads=1), flipping(offsets, 3, int(offsets[3]), FAR))
""",
    "offsets of the torch face": """
cdf = ops.quantize_cdf(torch.ones(16))
streams = ops.ac_encode(torch.arange(4000).reshape(8, 500) % 16, cdf)
offsets = streams.offsets.numpy()
race(lambda: ops.ac_decode(streams, cdf), flipping(offsets, 3, int(offsets[3]), FAR))
""",
    "lanes of a frame": """
cdf = native.quantize_cdf(np.ones(16))
data, offsets = native.ac_encode(np.arange(200).reshape(100, 2) % 16, cdf, lanes=2)
def flip():
    for lanes in (255, 0, 2):
        data[3::int(offsets[1])] = lanes
race(lambda: native.ac_decode(data, offsets, cdf, threads=1), flip)
""",
    "a row of frequencies": """
cdf = native.quantize_cdf(np.ones((1, 3000, 16), np.float32), precision=4)
symbols = np.arange(3000)[None] % 16
race(lambda: native.ac_encode(symbols, cdf, model_id=1, threads=1), flipping(cdf, (0, slice(None), 9), 9, 2**30), 0.5)
fixed = cdf[0, 0].copy()
race(lambda: native.ac_encode(symbols, fixed, model_id=1, threads=1), flipping(fixed, 9, 9, 2**30), 0.5)
data, offsets = native.ac_encode(symbols, fixed, model_id=1)
race(lambda: native.ac_decode(data, offsets, fixed, model_id=1, threads=1), flipping(fixed, 9, 9, 2**30), 0.5)
""",
    "logits without mass": """
logits = np.zeros((1, 200, 64), np.float32)
symbols = np.arange(200)[None] % 64
def flip():
    for _ in range(20):
        logits[:] = -np.inf
        logits[:] = 0
race(lambda: native.ac_encode_logits(symbols, logits, threads=1), flip, 0.7)
race(lambda: native.quantize_cdf(logits, logits=True, threads=1), flip, 0.7)
""",
    "rows of windows": """
sums, _ = native.window_counts(np.ones((5, 300)))
rows, start, size = np.zeros(4000, np.int64), np.zeros(4000, np.int64), np.full(4000, 2**16)
symbols = np.arange(4000) % 300
for array, at in ((rows, 2000), (symbols, 2000), (start, 7)):
    good = int(array[at])
    race(lambda: native.window_encode(sums, rows, start, size, symbols, bits=16, threads=1),
         flipping(array, at, good, FAR), 0.4)
race(lambda: native.window_encode(sums, rows, start, size, symbols, bits=16, threads=1),
     flipping(sums, (0, slice(1, None)), sums[0, 1:].copy(), 0), 0.4)
""",
    "tokens of a table": """
strings = [bytes([i]) for i in range(256)]
trie = native.EqualInfoTrie(native.pack_equal_info(strings))
tokens = np.arange(100000) % 256
race(lambda: trie.decode(tokens), flipping(tokens, 50002, int(tokens[50002]), FAR))
""",
    "the instruction set": """
names = native.available_isas()
def flip():
    for name in names:
        native.set_cpu_isa(name)
x, weight, cdf = torch.randn(200, 64), torch.randn(96, 64), native.quantize_cdf(np.ones(300))
symbols = np.arange(5000).reshape(50, 100) % 300
many = torch.randn(1, 4, 300, 64)
def call():
    out, lse = native.attention(many, many, many, threads=2)
    native.attention_backward(out, None, out, lse, many, many, many, threads=2)
    grad = native.invariant_linear(x, weight, threads=2)
    native.invariant_linear_backward(grad, x, weight, threads=2)
    native.rms_norm_backward(x, x, weight[0], threads=2)
    native.layer_norm_backward(x, x, weight[0], threads=2)
    native.gelu_mul_backward(x, x, x, threads=2)
    ops.invariant_linear(x.bfloat16(), weight.bfloat16())
    data, offsets = native.ac_encode(symbols, cdf, threads=2)
    assert (native.ac_decode(data, offsets, cdf, threads=2) == symbols).all()
    ops.attention(many, many, many)
    ops.invariant_linear(x, weight)
race(call, flip, 1.5)
""",
}


@pytest.mark.parametrize("name", RACES)
def test_race(name: str) -> None:
    done = subprocess.run([sys.executable, "-c", HARNESS + RACES[name]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"

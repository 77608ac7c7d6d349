# SPDX-License-Identifier: Apache-2.0
"""Run by .ci/run with the Python of an environment that has the wheel and torch: both faces compute, from the wheel."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import numpy as np
import torch

import pycore
from pycore import native, ops

package = Path(pycore.__file__).parent
assert package.is_relative_to(sys.prefix), f"{package} is not the installed wheel"

names = {str(file) for file in importlib.metadata.files("pycore-kernels") or ()}
for name in ("libpycore.so", "_C.abi3.so", "build_info.json", "py.typed", "native.pyi"):
    assert f"pycore/{name}" in names, f"the wheel lacks {name}"
strays = [name for name in names if not name.startswith(("pycore/", "pycore_kernels-"))]
assert not strays, f"the wheel carries {strays}"

query, key, value = torch.randn(3, 1, 2, 100, 32).unbind()
out = ops.lambda_attention(query, key, value, sink_size=4, window_size=16)
arrays = (query.numpy(), key.numpy(), value.numpy())
same, _ = native.attention(*arrays, schedule="lambda", schedule_args=[4, 16])
assert np.array_equal(out.numpy(), same), "the two faces call one kernel, so their bits are the same"
print(f"the wheel of {pycore.__version__} works in {sys.prefix}")

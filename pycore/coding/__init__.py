# SPDX-License-Identifier: Apache-2.0
"""Coded streams, and text as tokens of equal information: what `pycore.ops`' coder and its kernels are used through."""

# SPDX-License-Identifier: Apache-2.0
"""Modules built on :mod:`pycore.ops`. None yet."""

# SPDX-License-Identifier: Apache-2.0
"""Microbenchmarks: every op beside its peers and the machine's limits, in one run. See bench/README.md."""

# SPDX-License-Identifier: Apache-2.0
"""The shortest correct version of every op, in plain torch: what tests and readers compare with."""

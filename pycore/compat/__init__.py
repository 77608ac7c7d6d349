# SPDX-License-Identifier: Apache-2.0
"""Other libraries' functions, by their own signatures and rules, on pycore's kernels: change the import and no more."""

# SPDX-License-Identifier: Apache-2.0
"""pycore inside other libraries; each module needs its library, and importing pycore loads none of them."""

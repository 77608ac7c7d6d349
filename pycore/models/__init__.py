# SPDX-License-Identifier: Apache-2.0
"""Small models built on pycore's ops alone; each module stands for itself, so importing one loads no other."""

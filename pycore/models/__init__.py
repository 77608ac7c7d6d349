# SPDX-License-Identifier: Apache-2.0
"""Small models built on pycore's ops alone; importing one loads no other but what it is made of."""

# SPDX-License-Identifier: Apache-2.0
"""`python -m pycore.models.lmzip`."""

from __future__ import annotations

import sys

from pycore.models.lmzip.command import main

if __name__ == "__main__":
    sys.exit(main())

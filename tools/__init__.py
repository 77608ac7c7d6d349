# SPDX-License-Identifier: Apache-2.0
"""What looks at the library from outside: machine code, sanitizers on a device, the run on a GPU machine."""

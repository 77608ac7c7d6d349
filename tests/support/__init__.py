# SPDX-License-Identifier: Apache-2.0
"""What several tests share: `from tests.support.tolerance import assert_as_accurate`."""

// SPDX-License-Identifier: Apache-2.0
// Everything is compiled with hidden visibility; what the faces call in libpycore carries PYCORE_API.
#pragma once

#define PYCORE_API __attribute__((visibility("default")))

// SPDX-License-Identifier: Apache-2.0
// The CRC-32C of one symbol many times over, in as many steps as the number has bits. A CRC's register after a symbol
// is A r + b over the field of two elements, with A and b of the symbol alone; twice the run is that map after itself.
#pragma once

#include <pycore/arithmetic_coding/coder_math.h>

#include <cstdint>

namespace pycore {

struct CrcMap {
  uint32_t columns[32], constant;
};

PYCORE_CODER uint32_t crc_map_linear(const CrcMap& map, uint32_t crc) {
  uint32_t out = 0;
  for (int bit = 0; bit < 32; ++bit) out ^= crc >> bit & 1 ? map.columns[bit] : 0;
  return out;
}

// The register after `count` more symbols of four bytes, all the same.
PYCORE_CODER uint32_t crc32c_run(uint32_t crc, uint32_t symbol, int64_t count) {
  const auto take = [](uint32_t state, uint32_t word) {
    for (int byte = 0; byte < 4; ++byte) state = crc32c_add(state, static_cast<uint8_t>(word >> 8 * byte));
    return state;
  };
  CrcMap map;
  for (int bit = 0; bit < 32; ++bit) map.columns[bit] = take(uint32_t{1} << bit, 0);
  map.constant = take(0, symbol);
  for (; count > 0; count >>= 1) {
    if (count & 1) crc = crc_map_linear(map, crc) ^ map.constant;
    CrcMap twice;
    for (int bit = 0; bit < 32; ++bit) twice.columns[bit] = crc_map_linear(map, map.columns[bit]);
    twice.constant = crc_map_linear(map, map.constant) ^ map.constant;
    map = twice;
  }
  return crc;
}

}  // namespace pycore

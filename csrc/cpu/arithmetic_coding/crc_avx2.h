// SPDX-License-Identifier: Apache-2.0
// CRC-32C by SSE4.2's instruction, which AVX2 and AVX-512 machines have. Included inside an anonymous namespace.

inline uint32_t crc_eight(uint32_t crc, uint64_t data) { return static_cast<uint32_t>(_mm_crc32_u64(crc, data)); }
inline uint32_t crc_four(uint32_t crc, uint32_t data) { return _mm_crc32_u32(crc, data); }
inline uint32_t crc_one(uint32_t crc, uint8_t byte) { return _mm_crc32_u8(crc, byte); }

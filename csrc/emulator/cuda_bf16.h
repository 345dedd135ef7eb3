// Stands in for the toolkit's header: the bfloat16 type, as far as the kernels use it.
#pragma once

#include "emulator.h"

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  // to the nearest, ties to even; what is not finite keeps its upper half
  explicit __nv_bfloat16(float x) {
    uint32_t word;
    std::memcpy(&word, &x, sizeof word);
    if ((word & 0x7f800000u) != 0x7f800000u) word += 0x7fffu + (word >> 16 & 1u);
    bits = static_cast<uint16_t>(word >> 16);
  }
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t word = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// Stands in for the toolkit's header: the half type, as far as the kernels use it.
#pragma once

#include "emulator.h"

struct __half {
  _Float16 value;
  __half() = default;
  explicit __half(float x) : value(static_cast<_Float16>(x)) {}
};

inline float __half2float(__half x) { return static_cast<float>(x.value); }

// What the kernels of this folder have in common: code for several kinds of processor, sixteen floats at once, e^x, and rotary turns.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EVERLIT_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EVERLIT_CLONES
#endif
#define EVERLIT_INLINE inline __attribute__((always_inline))

namespace {

typedef float Vector __attribute__((vector_size(64)));
typedef float LooseVector __attribute__((vector_size(64), aligned(4), may_alias));

EVERLIT_INLINE Vector load(const float* from) { return *reinterpret_cast<const LooseVector*>(from); }
EVERLIT_INLINE void store(float* to, const Vector& value) { *reinterpret_cast<LooseVector*>(to) = value; }

// e^x to 1.5 units in the last place, written so that a compiler makes vectors of it (Cephes' polynomial).
EVERLIT_INLINE float exponential(float x) {
  x = x > 88.0f ? 88.0f : (x < -87.0f ? -87.0f : x);
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + (127 - 0x4B400000)) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// One position's head turned: features i and i + half by the angle of the position.
EVERLIT_INLINE void turn(const float* __restrict in, float* __restrict out, const float* __restrict cos, const float* __restrict sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    out[i] = in[i] * cos[i] - in[i + half] * sin[i];
    out[i + half] = in[i + half] * cos[i] + in[i] * sin[i];
  }
}

EVERLIT_INLINE void turn_back(const float* __restrict in, float* __restrict out, const float* __restrict cos, const float* __restrict sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    out[i] = in[i] * cos[i] + in[i + half] * sin[i];
    out[i + half] = in[i + half] * cos[i] - in[i] * sin[i];
  }
}

}  // namespace

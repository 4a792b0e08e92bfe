// The numbers of PTX, and their layout in a warp's registers.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;
const f32 NAN32 = std::bit_cast<f32>(0x7fffffffu);
// A result: every float32 operation of PTX returns the same NaN, for any NaN operand.
inline f32 canonical(f32 x) { return x != x ? NAN32 : x; }
template <class T> T canonical(T x) { return x; }

// Half precision computes in float32 and rounds its results.
struct bf16 {
  u16 bits;
  bf16() = default;
  bf16(f32 x) {
    u32 b = std::bit_cast<u32>(x);
    bits = x != x ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;  // to nearest, ties to even
  }
  operator f32() const { return std::bit_cast<f32>(u32(bits) << 16); }
};
struct f16 {
  u16 bits;
  f16() = default;
  f16(f32 x) { bits = x != x ? 0x7fff : std::bit_cast<u16>(_Float16(x)); }
  operator f32() const { return std::bit_cast<_Float16>(bits); }
};
template <class T> struct Pair {  // in a register of 32 bits
  T low, high;
};
using f16x2 = Pair<f16>;
using bf16x2 = Pair<bf16>;
using f32x2 = Pair<f32>;  // in a register of 64 bits

inline f32 e4m3(u8 x) {
  u32 magnitude = x & 0x7f;
  f32 value = magnitude == 0x7f ? NAN32 : std::bit_cast<f32>(magnitude << 20) * 0x1p120f;
  return x & 0x80 ? -value : value;
}
// .ftz: flush a subnormal number to zero.
inline f32 flushed(f32 x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }

// The lowest bits of x, signed or unsigned.
inline s64 extended(u64 x, s64 bits, bool is_signed) {
  u64 high = x << (64 - bits);
  return is_signed ? s64(high) >> (64 - bits) : s64(high >> (64 - bits));
}

// A register is a slot: 32 lanes of 32 bits.  One of 64 bits takes two slots.
template <class T> T get(const u32* slot, int lane) {
  if constexpr (sizeof(T) == 8) return std::bit_cast<T>(((const u64*)slot)[lane]);
  else if constexpr (sizeof(T) == 4) return std::bit_cast<T>(slot[lane]);
  else return std::bit_cast<T>(u16(slot[lane]));
}
template <class T> void put(u32* slot, int lane, T value) {
  if constexpr (sizeof(T) == 8) ((u64*)slot)[lane] = std::bit_cast<u64>(value);
  else if constexpr (sizeof(T) == 4) slot[lane] = std::bit_cast<u32>(value);
  else slot[lane] = std::bit_cast<u16>(value);
}

const u32 ALL_LANES = ~0u;
inline bool in(u32 lanes, int lane) { return lanes >> lane & 1; }
template <class F> void each(u32 lanes, F f) {
  for (; lanes; lanes &= lanes - 1) f(std::countr_zero(lanes));
}

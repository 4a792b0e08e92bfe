// The numbers of PTX, and how they lie in a warp's registers.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;

const u32 ALL_LANES = ~0u;
const f32 NAN32 = std::numeric_limits<f32>::quiet_NaN();

// Half precision computes as float32 and rounds its results.
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

// Two of them in a register of 32 bits.
template <class T> struct Pair {
  T low, high;
};
using f16x2 = Pair<f16>;
using bf16x2 = Pair<bf16>;

// Tensor cores ignore a float32's low bits.
inline f32 tf32(u32 x) { return std::bit_cast<f32>(x & 0xffffe000u); }

inline f32 e4m3(u8 x) {
  u32 magnitude = x & 0x7f;
  f32 value = magnitude == 0x7f ? NAN32 : std::bit_cast<f32>(magnitude << 20) * 0x1p120f;
  return x & 0x80 ? -value : value;
}
inline f32 e5m2(u8 x) { return f32(std::bit_cast<f16>(u16(x << 8))); }

// What .ftz does with a number too small for its exponent.
inline f32 flushed(f32 x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }

// A register is a slot: 32 lanes of 32 bits.  One of 64 bits takes two slots.
template <class T> T get(const u32* slot, int lane) {
  if constexpr (sizeof(T) == 8)
    return std::bit_cast<T>(reinterpret_cast<const u64*>(slot)[lane]);
  else if constexpr (sizeof(T) == 4)
    return std::bit_cast<T>(slot[lane]);
  else
    return std::bit_cast<T>(u16(slot[lane]));
}
template <class T> void put(u32* slot, int lane, T value) {
  if constexpr (sizeof(T) == 8)
    reinterpret_cast<u64*>(slot)[lane] = std::bit_cast<u64>(value);
  else if constexpr (sizeof(T) == 4)
    slot[lane] = std::bit_cast<u32>(value);
  else
    slot[lane] = std::bit_cast<u16>(value);
}

inline bool is_active(u32 active, int lane) { return active >> lane & 1; }
template <class F> void active_lanes(u32 active, F f) {
  for (; active; active &= active - 1) f(std::countr_zero(active));
}

// Compute all lanes, then keep the active ones: such a loop becomes vector instructions.
template <class T, class F> void keep_active(u32* to, u32 active, F value) {
  T results[32];
  for (int lane = 0; lane < 32; lane++) results[lane] = value(lane);
  if (active == ALL_LANES)
    for (int lane = 0; lane < 32; lane++) put<T>(to, lane, results[lane]);
  else
    for (int lane = 0; lane < 32; lane++)
      if (is_active(active, lane)) put<T>(to, lane, results[lane]);
}

// Its lowest bits, with a sign or without.
inline s64 extended(u64 x, s64 bits, bool is_signed) {
  int shift = 64 - bits;
  return is_signed ? s64(x << shift) >> shift : s64(x << shift >> shift);
}

// Instructions that compute each lane separately: a row of a table is an instruction and its types.
#pragma once
#include "machine.h"

template <class T> constexpr bool is_pair = false;
template <class T> constexpr bool is_pair<Pair<T>> = true;

template <class Result, class F, class... Sources> Result compute(F f, Sources... x) {
  if constexpr ((is_pair<Result> && ... && is_pair<Sources>))
    return {canonical(decltype(Result::low)(f(x.low...))),
            canonical(decltype(Result::low)(f(x.high...)))};
  else
    return canonical(static_cast<Result>(f(x...)));
}
template <class Result, class F, class... Sources, size_t... I>
void run_lanes(Step& s, std::index_sequence<I...>) {
  const u32* from[] = {s.slot(1 + I)...};
  s.set<Result>(0, [&](int n) { return compute<Result>(F{}, get<Sources>(from[I], n)...); });
}
// name: Result = f(Sources ...).
template <class Result, class... Sources, class F> void lanes(const std::string& name, F) {
  normal(name, [](Step& s) {
    run_lanes<Result, F, Sources...>(s, std::index_sequence_for<Sources...>{});
  });
}

template <class T> const std::string suffix;
#define NAME(type) template <> const std::string suffix<type> = "." #type;
NAME(s8) NAME(u8) NAME(s16) NAME(u16) NAME(s32) NAME(u32) NAME(s64) NAME(u64)
NAME(f16) NAME(bf16) NAME(f32) NAME(f16x2) NAME(bf16x2) NAME(f32x2)
#undef NAME

// One operation for each type; all operands have this type.
template <class... T, class F> void unary(const std::string& name, F f) {
  (lanes<T, T>(name + suffix<T>, f), ...);
  if constexpr ((std::is_same_v<T, f32> || ...))
    lanes<f32, f32>(name + ".ftz.f32", [](auto a) { return flushed(F{}(flushed(a))); });
}
template <class... T, class F> void binary(const std::string& name, F f) {
  (lanes<T, T, T>(name + suffix<T>, f), ...);
  auto ftz = [](auto a, auto b) { return flushed(F{}(flushed(a), flushed(b))); };
  if constexpr ((std::is_same_v<T, f32> || ...)) lanes<f32, f32, f32>(name + ".ftz.f32", ftz);
}
template <class... T, class F> void ternary(const std::string& name, F f) {
  (lanes<T, T, T, T>(name + suffix<T>, f), ...);
}
template <class... T, class F> void shift(const std::string& name, F f) {
  (lanes<T, T, u32>(name + suffix<T>, f), ...);
}

template <class T> T quotient(T a, T b) {  // no trap if the divisor is 0 or -1
  if (b == 0) return T(-1);
  return std::is_signed_v<T> && b == T(-1) ? T(0 - a) : T(a / b);
}
template <class T> T shifted_right(T a, u32 n) {
  return n < 8 * sizeof(T) ? a >> n : a < 0 ? T(-1) : T(0);
}
inline u32 permuted(u32 a, u32 b, u32 selector) {
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    u32 nibble = selector >> (4 * i);
    u8 byte = (u64(b) << 32 | a) >> (8 * (nibble & 7));
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= u32(byte) << (8 * i);
  }
  return result;
}
template <class T> T field(T a, u32 start, u32 length) {
  s64 shifted = s64(a) >> std::min(start & 0xff, 63u);
  return length & 0xff ? extended(shifted, std::min(length & 0xff, 32u), std::is_signed_v<T>) : 0;
}

// Signed types if the sign matters; otherwise ptx.py uses u.
inline Table integers([] {
  binary<u16, u32, u64>("add", [](auto a, auto b) { return a + b; });
  binary<u16, u32, u64>("sub", [](auto a, auto b) { return a - b; });
  binary<u16, u32, u64>("mul.lo", [](auto a, auto b) { return u64(a) * u64(b); });
  ternary<u16, u32, u64>("mad.lo", [](auto a, auto b, auto c) { return u64(a) * u64(b) + c; });
  binary<u16, u32, u64>("and", [](auto a, auto b) { return a & b; });
  binary<u16, u32, u64>("or", [](auto a, auto b) { return a | b; });
  binary<u16, u32, u64>("xor", [](auto a, auto b) { return a ^ b; });
  unary<u16, u32, u64>("not", [](auto a) { return ~a; });
  unary<u16, u32, u64>("neg", [](auto a) { return 0 - a; });
  unary<u16, u32, u64>("mov", [](auto a) { return a; });
  unary<s16, s32, s64>("abs", [](auto a) { return a < 0 ? 0 - a : a; });
  binary<s16, u16, s32, u32, s64, u64>("min", [](auto a, auto b) { return a < b ? a : b; });
  binary<s16, u16, s32, u32, s64, u64>("max", [](auto a, auto b) { return a > b ? a : b; });
  binary<s16, u16, s32, u32, s64, u64>("div", [](auto a, auto b) { return quotient(a, b); });
  binary<s16, u16, s32, u32, s64, u64>("rem", [](auto a, auto b) {
    return b == 0 ? a : a - quotient(a, b) * b;
  });
  shift<u16, u32, u64>("shl", [](auto a, u32 n) { return n < 8 * sizeof a ? a << n : 0; });
  shift<s16, u16, s32, u32, s64, u64>("shr", [](auto a, u32 n) { return shifted_right(a, n); });
  lanes<u64, u32, u32>("mul.wide.u32", [](u64 a, u64 b) { return a * b; });
  lanes<s64, s32, s32>("mul.wide.s32", [](s64 a, s64 b) { return a * b; });
  lanes<u32, u16, u16>("mul.wide.u16", [](u32 a, u32 b) { return a * b; });
  lanes<s32, s16, s16>("mul.wide.s16", [](s32 a, s32 b) { return a * b; });
  lanes<u64, u32, u32, u64>("mad.wide.u32", [](u64 a, u64 b, u64 c) { return a * b + c; });
  lanes<s64, s32, s32, s64>("mad.wide.s32", [](s64 a, s64 b, s64 c) { return a * b + c; });
  lanes<u32, u16, u16, u32>("mad.wide.u16", [](u32 a, u32 b, u32 c) { return a * b + c; });
  lanes<s32, s16, s16, s32>("mad.wide.s16", [](s32 a, s32 b, s32 c) { return a * b + c; });
  lanes<u32, u32, u32>("mul.hi.u32", [](u64 a, u64 b) { return a * b >> 32; });
  lanes<s32, s32, s32>("mul.hi.s32", [](s64 a, s64 b) { return a * b >> 32; });
  lanes<s64, s64, s64>("mul.hi.s64", [](s64 a, s64 b) { return s64((__int128)a * b >> 64); });
  lanes<u32, u32, u32, u32>("bfe.u32", [](u32 a, u32 at, u32 n) { return field(a, at, n); });
  lanes<s32, s32, u32, u32>("bfe.s32", [](s32 a, u32 at, u32 n) { return field(a, at, n); });
  ternary<u32>("prmt", [](u32 a, u32 b, u32 which) { return permuted(a, b, which); });
  lanes<u16, u16, u16, u32>("selp.u16", [](u16 a, u16 b, u32 which) { return which ? a : b; });
  lanes<u32, u32, u32, u32>("selp.u32", [](u32 a, u32 b, u32 which) { return which ? a : b; });
  lanes<u64, u64, u64, u32>("selp.u64", [](u64 a, u64 b, u32 which) { return which ? a : b; });
  lanes<u32, u32>("not.pred", [](u32 a) { return a ^ 1; });
  lanes<u32, u32>("mov.pred", [](u32 a) { return a != 0; });
  lanes<u64, u64>("cvta.param", [](u64 a) { return a + PARAMETERS; });
});

// Minimum and maximum of floats: if one is NaN, the other; with .NaN, NaN.
inline f32 smaller(f32 a, f32 b) {
  return a != a ? b : b != b ? a : a < b || (a == b && std::signbit(a)) ? a : b;
}
inline f32 larger(f32 a, f32 b) {
  return a != a ? b : b != b ? a : a > b || (a == b && !std::signbit(a)) ? a : b;
}
inline f32 smaller_or_nan(f32 a, f32 b) { return a != a || a < b ? a : b; }
inline f32 larger_or_nan(f32 a, f32 b) { return a != a || a > b ? a : b; }

template <class... T> void sums_and_products() {
  binary<T...>("add", [](auto a, auto b) { return a + b; });
  binary<T...>("sub", [](auto a, auto b) { return a - b; });
  binary<T...>("mul", [](auto a, auto b) { return a * b; });
  ternary<T...>("fma", [](f32 a, f32 b, f32 c) { return std::fma(a, b, c); });
}
template <class T> void mixed() {  // the last operand is a float32, the others are halves (Blackwell)
  lanes<f32, T, f32>("add.f32" + suffix<T>, [](f32 a, f32 b) { return a + b; });
  lanes<f32, T, f32>("sub.f32" + suffix<T>, [](f32 a, f32 b) { return a - b; });
  lanes<f32, T, T, f32>("fma.f32" + suffix<T>, [](f32 a, f32 b, f32 c) {
    return std::fma(a, b, c);
  });
}
template <class... T> void halves_too() {
  sums_and_products<f32, T...>();
  binary<f32, T...>("min", [](f32 a, f32 b) { return smaller(a, b); });
  binary<f32, T...>("max", [](f32 a, f32 b) { return larger(a, b); });
  binary<f32, T...>("min.NaN", [](f32 a, f32 b) { return smaller_or_nan(a, b); });
  binary<f32, T...>("max.NaN", [](f32 a, f32 b) { return larger_or_nan(a, b); });
  unary<f32, T...>("neg", [](auto a) { return -a; });
  unary<f32, T...>("abs", [](f32 a) { return std::fabs(a); });
  unary<f32, T...>("ex2", [](f32 a) { return std::exp2(a); });
  unary<f32, T...>("tanh", [](f32 a) { return std::tanh(a); });
}
inline Table floats([] {
  halves_too<f16, bf16, f16x2, bf16x2>();
  sums_and_products<f32x2>();
  mixed<f16>();
  mixed<bf16>();
  lanes<f32, f32, f32, f32>("fma.ftz.f32", [](f32 a, f32 b, f32 c) {
    return flushed(std::fma(flushed(a), flushed(b), flushed(c)));
  });
  binary<f32>("div", [](auto a, auto b) { return a / b; });
  unary<f32>("rcp", [](auto a) { return 1 / a; });
  unary<f32>("sqrt", [](auto a) { return std::sqrt(a); });
  unary<f32>("rsqrt", [](auto a) { return 1 / std::sqrt(a); });
  unary<f32>("lg2", [](auto a) { return std::log2(a); });
});

// setp: [d, d of a pair's upper half, x, y, the sum of the cases in its favor: less 1, equal 2,
// greater 4, unordered 8].
template <class T> void compare(Step& s) {
  const u32 *x = s.slot(2), *y = s.slot(3), true_for = s[4];
  auto compare_parts = [&](int to, auto part) {
    s.set<u32>(to, [&](int lane) {
      auto a = part(get<T>(x, lane)), b = part(get<T>(y, lane));
      u32 relation = u32(a < b) | u32(a == b) << 1 | u32(a > b) << 2;
      return ((relation ? relation : 8) & true_for) != 0;
    });
  };
  if constexpr (is_pair<T>) {
    compare_parts(0, [](T x) { return x.low; });
    compare_parts(1, [](T x) { return x.high; });
  } else {
    compare_parts(0, [](T x) { return x; });
  }
}
template <class... T> void comparisons() { (normal("setp" + suffix<T>, compare<T>), ...); }

// From or to a float: [d, x, rounding to an integer: n 0, z 1, m 2, p 3, none -1].  float64
// represents every type exactly.
inline f64 rounded(f64 x, s64 how) {
  switch (how) {
    case 0: return std::nearbyint(x);
    case 1: return std::trunc(x);
    case 2: return std::floor(x);
    case 3: return std::ceil(x);
    default: return x;
  }
}
template <class To, class From> void convert(Step& s) {
  const u32* from = s.slot(1);
  s64 how = s[2];
  s.set<To>(0, [&](int lane) {
    From x = get<From>(from, lane);
    if constexpr (std::is_integral_v<To>) {
      using Limits = std::numeric_limits<To>;
      f64 value = rounded(f64(f32(x)), how);
      return value != value ? To(0) : To(std::clamp(value, f64(Limits::min()), f64(Limits::max())));
    } else {
      return canonical(To(how < 0 ? f32(x) : f32(rounded(x, how))));
    }
  });
}
template <class Float, class... T> void conversions() {
  (normal("cvt" + suffix<Float> + suffix<T>, convert<Float, T>), ...);
  (normal("cvt" + suffix<T> + suffix<Float>, convert<T, Float>), ...);
}
inline Table conversion([] {
  comparisons<s16, u16, s32, u32, s64, u64, f16, bf16, f32, f16x2, bf16x2>();
  conversions<f32, f16, bf16, f32, s16, u16, s32, u32>();
  conversions<f16, f16, bf16, s16, u16, s32, u32>();
  conversions<bf16, bf16, s16, u16, s32, u32>();
  lanes<bf16x2, f32, f32>("cvt.bf16x2.f32", [](f32 high, f32 low) { return bf16x2{low, high}; });
  lanes<f16x2, f32, f32>("cvt.f16x2.f32", [](f32 high, f32 low) { return f16x2{low, high}; });
  lanes<f16x2, u16>("cvt.f16x2.e4m3x2", [](u16 a) { return f16x2{e4m3(a), e4m3(a >> 8)}; });
  lanes<u32, u32>("cvt.rna.tf32.f32", [](u32 a) {
    bool nan = (a & 0x7fffffff) > 0x7f800000;
    return (nan ? a : a + 0x1000) & 0xffffe000;
  });
  // Between integers: [d, bits of its register, x, bits of its register, bits of the type from,
  // whether it is signed, bits of the type to, whether it is signed].
  normal("cvt.integer", [](Step& s) {
    s.set_bits(0, s[1], [&](int lane) {
      return extended(extended(s.w.raw(s[2], s[3], lane), s[4], s[5]), s[6], s[7]);
    });
  });
  // mov of parts, the lowest first: [whole, bits of it, parts ...]; -1 for an unused part.
  normal("pack", [](Step& s) {
    s64 bits = s[1] / (s.count() - 2);
    s.set_bits(0, s[1], [&](int lane) {
      u64 whole = 0;
      for (int n = s.count() - 1; n >= 2; n--)
        whole = whole << bits | extended(s.slot(n)[lane], bits, false);
      return whole;
    });
  });
  normal("unpack", [](Step& s) {
    s64 bits = s[1] / (s.count() - 2);
    u64 whole[32];
    for (int lane = 0; lane < 32; lane++) whole[lane] = s.w.raw(s[0], s[1], lane);
    for (size_t n = 2; n < s.count(); n++)
      if (s[n] >= 0)
        s.set_bits(n, bits, [&](int lane) {
          return extended(whole[lane] >> (bits * (n - 2)), bits, false);
        });
  });
});

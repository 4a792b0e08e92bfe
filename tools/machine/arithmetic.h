// Instructions that compute each lane by itself: a row of a table is an instruction and its types.
#pragma once
#include <type_traits>

#include "machine.h"

template <class T> struct IsPair : std::false_type {};
template <class T> struct IsPair<Pair<T>> : std::true_type {};

template <class Result, class F, class... Sources> Result compute(F f, Sources... x) {
  if constexpr (IsPair<Result>::value && (IsPair<Sources>::value && ...))
    return {compute<decltype(Result::low)>(f, x.low...), compute<decltype(Result::high)>(f, x.high...)};
  else
    return static_cast<Result>(f(x...));
}

template <class Result, class F, class... Sources, size_t... I>
void run_lanes(Warp& w, const Instruction& i, u32 active, std::index_sequence<I...>) {
  const u32* from[] = {w.slot(i.a[1 + I])...};
  keep_active<Result>(w.slot(i.a[0]), active, [&](int lane) {
    return compute<Result>(F{}, get<Sources>(from[I], lane)...);
  });
}

// name: Result = f(Sources ...), for each lane.
template <class Result, class... Sources, class F> void lanes(const std::string& name, F) {
  normal(name, [](Machine&, Warp& w, const Instruction& i, u32 active) {
    run_lanes<Result, F, Sources...>(w, i, active, std::index_sequence_for<Sources...>{});
  });
}

template <class T> const char* type_name();
#define NAME(type) \
  template <> const char* type_name<type>() { return #type; }
NAME(s16) NAME(u16) NAME(s32) NAME(u32) NAME(s64) NAME(u64)
NAME(f16) NAME(bf16) NAME(f32) NAME(f64) NAME(f16x2) NAME(bf16x2)
#undef NAME

// One for each of the types, all operands being of it.
template <class... T, class F> void unary(const std::string& name, F f) {
  (lanes<T, T>(name + "." + type_name<T>(), f), ...);
  if constexpr ((std::is_same_v<T, f32> || ...))
    lanes<f32, f32>(name + ".ftz.f32", [](f32 a) { return flushed(F{}(flushed(a))); });
}
template <class... T, class F> void binary(const std::string& name, F f) {
  (lanes<T, T, T>(name + "." + type_name<T>(), f), ...);
  auto ftz = [](auto a, auto b) { return flushed(F{}(flushed(a), flushed(b))); };
  if constexpr ((std::is_same_v<T, f32> || ...)) lanes<f32, f32, f32>(name + ".ftz.f32", ftz);
}
template <class... T, class F> void ternary(const std::string& name, F f) {
  (lanes<T, T, T, T>(name + "." + type_name<T>(), f), ...);
}
template <class... T, class F> void shift(const std::string& name, F f) {
  (lanes<T, T, u32>(name + "." + type_name<T>(), f), ...);
}

template <class T> int width(T) { return sizeof(T) * 8; }

// Signed types where the sign matters; where it doesn't, ptx.py says u.
Register integers([] {
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
  binary<s16, u16, s32, u32, s64, u64>("div", [](auto a, auto b) {
    return b == 0 ? decltype(a)(-1) : decltype(b)(b + 1) == 0 && decltype(a)(-1) < 0 ? 0 - a : a / b;
  });
  binary<s16, u16, s32, u32, s64, u64>("rem", [](auto a, auto b) {
    return b == 0 ? a : decltype(b)(b + 1) == 0 && decltype(a)(-1) < 0 ? decltype(a)(0) : a % b;
  });
  shift<u16, u32, u64>("shl", [](auto a, u32 n) {
    return n >= u32(width(a)) ? decltype(a)(0) : a << n;
  });
  shift<s16, u16, s32, u32, s64, u64>("shr", [](auto a, u32 n) {
    return n >= u32(width(a)) ? (a < 0 ? decltype(a)(-1) : decltype(a)(0)) : a >> n;
  });
  lanes<u32, u16, u16>("mul.wide.u16", [](u32 a, u32 b) { return a * b; });
  lanes<s32, s16, s16>("mul.wide.s16", [](s32 a, s32 b) { return a * b; });
  lanes<u64, u32, u32>("mul.wide.u32", [](u64 a, u64 b) { return a * b; });
  lanes<s64, s32, s32>("mul.wide.s32", [](s64 a, s64 b) { return a * b; });
  lanes<u64, u32, u32, u64>("mad.wide.u32", [](u64 a, u64 b, u64 c) { return a * b + c; });
  lanes<s64, s32, s32, s64>("mad.wide.s32", [](s64 a, s64 b, s64 c) { return a * b + c; });
  lanes<u32, u32, u32>("mul.hi.u32", [](u64 a, u64 b) { return a * b >> 32; });
  lanes<s32, s32, s32>("mul.hi.s32", [](s64 a, s64 b) { return a * b >> 32; });
  lanes<u32, u32, u32, u32>("mad.hi.u32", [](u64 a, u64 b, u64 c) { return (a * b >> 32) + c; });
  using u128 = unsigned __int128;
  lanes<u64, u64, u64>("mul.hi.u64", [](u64 a, u64 b) { return u128(a) * b >> 64; });
  lanes<s64, s64, s64>("mul.hi.s64", [](s64 a, s64 b) { return __int128(a) * b >> 64; });
});

Register bits([] {
  unary<u32>("popc", [](u32 a) { return __builtin_popcount(a); });
  unary<u32>("clz", [](u32 a) { return a ? __builtin_clz(a) : 32; });
  unary<u32>("brev", [](u32 a) {
    u32 reversed = 0;
    for (int i = 0; i < 32; i++) reversed |= (a >> i & 1) << (31 - i);
    return reversed;
  });
  auto field = [](auto a, u32 start, u32 length) {  // sign-extended, if it has a sign
    start = std::min(start & 0xff, 63u), length = std::min(length & 0xff, 32u);
    using Wide = std::conditional_t<std::is_signed_v<decltype(a)>, s64, u64>;
    return length ? Wide(Wide(a) >> start << (64 - length)) >> (64 - length) : Wide(0);
  };
  lanes<u32, u32, u32, u32>("bfe.u32", field);
  lanes<s32, s32, u32, u32>("bfe.s32", field);
  ternary<u32>("prmt", [](u32 a, u32 b, u32 selector) {
    u32 result = 0;
    for (int i = 0; i < 4; i++) {
      u32 nibble = selector >> (4 * i);
      u8 byte = (u64(b) << 32 | a) >> (8 * (nibble & 7));
      if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
      result |= u32(byte) << (8 * i);
    }
    return result;
  });
  lanes<u32, u32, u32, u32, u32>("lop3.u32", [](u32 a, u32 b, u32 c, u32 table) {
    u32 result = 0;
    for (int i = 0; i < 8; i++)
      if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return result;
  });
  lanes<u32, u32, u32, u32, u32>("bfi.u32", [](u32 a, u32 b, u32 start, u32 length) {
    start = std::min(start & 0xff, 32u), length = std::min(length & 0xff, 32u);
    u32 mask = ((u64(1) << length) - 1) << start;
    return (b & ~mask) | (u32(u64(a) << start) & mask);
  });
  ternary<u32>("shf.l.wrap", [](u32 a, u32 b, u32 n) { return (u64(b) << 32 | a) << (n & 31) >> 32; });
  ternary<u32>("shf.r.wrap", [](u32 a, u32 b, u32 n) { return (u64(b) << 32 | a) >> (n & 31); });
  lanes<u16, u16, u16, u32>("selp.u16", [](u16 a, u16 b, u32 which) { return which ? a : b; });
  lanes<u32, u32, u32, u32>("selp.u32", [](u32 a, u32 b, u32 which) { return which ? a : b; });
  lanes<u64, u64, u64, u32>("selp.u64", [](u64 a, u64 b, u32 which) { return which ? a : b; });
  lanes<u32, u32>("not.pred", [](u32 a) { return a ^ 1; });
  lanes<u32, u32>("mov.pred", [](u32 a) { return a != 0; });
  lanes<u64, u64>("cvta.param", [](u64 a) { return a + PARAMETERS; });
  lanes<u64, u64>("cvta.shared", [](u64 a) { return a + SHARED; });
});

Register floats([] {
  auto all = []<class... T>(Pair<T>*...) {
    binary<f32, f64, T..., Pair<T>...>("add", [](auto a, auto b) { return a + b; });
    binary<f32, f64, T..., Pair<T>...>("sub", [](auto a, auto b) { return a - b; });
    binary<f32, f64, T..., Pair<T>...>("mul", [](auto a, auto b) { return a * b; });
    binary<f32, f64, T..., Pair<T>...>("min", [](auto a, auto b) {
      return a != a ? b : b != b ? a : a < b || (a == b && std::signbit(f32(a))) ? a : b;
    });
    binary<f32, f64, T..., Pair<T>...>("max", [](auto a, auto b) {
      return a != a ? b : b != b ? a : a > b || (a == b && !std::signbit(f32(a))) ? a : b;
    });
    binary<f32, f64, T..., Pair<T>...>("min.NaN", [](auto a, auto b) {
      return a != a ? a : b != b ? b : a < b ? a : b;
    });
    binary<f32, f64, T..., Pair<T>...>("max.NaN", [](auto a, auto b) {
      return a != a ? a : b != b ? b : a > b ? a : b;
    });
    unary<f32, f64, T..., Pair<T>...>("neg", [](auto a) { return -a; });
    unary<f32, f64, T..., Pair<T>...>("abs", [](auto a) { return std::fabs(a); });
    unary<f32, T..., Pair<T>...>("ex2", [](auto a) { return std::exp2(f32(a)); });
    unary<f32, T..., Pair<T>...>("tanh", [](auto a) { return std::tanh(f32(a)); });
    ternary<f32, f64, T..., Pair<T>...>("fma", [](auto a, auto b, auto c) {
      using Sum = decltype(a * b);
      return std::fma(Sum(a), Sum(b), Sum(c));
    });
  };
  all(static_cast<f16x2*>(nullptr), static_cast<bf16x2*>(nullptr));
  lanes<f32, f32, f32, f32>("fma.ftz.f32", [](f32 a, f32 b, f32 c) {
    return flushed(std::fma(flushed(a), flushed(b), flushed(c)));
  });
  binary<f32, f64>("div", [](auto a, auto b) { return a / b; });
  unary<f32, f64>("rcp", [](auto a) { return 1 / a; });
  unary<f32, f64>("sqrt", [](auto a) { return std::sqrt(a); });
  unary<f32, f64>("rsqrt", [](auto a) { return 1 / std::sqrt(a); });
  unary<f32>("lg2", [](f32 a) { return std::log2(a); });
  unary<f32>("sin", [](f32 a) { return std::sin(a); });
  unary<f32>("cos", [](f32 a) { return std::cos(a); });
});

// setp: a = [d, its opposite or -1, x, y, c or -1, which of less 1, equal 2, greater 4 and
// unordered 8 are true, how c joins: and 0, or 1, xor 2].
inline u32 joined(u32 result, u32 c, s64 how) {
  return how == 0 ? result & c : how == 1 ? result | c : result ^ c;
}
template <class T> void compare(Machine&, Warp& w, const Instruction& i, u32 active) {
  const u32 *x = w.slot(i.a[2]), *y = w.slot(i.a[3]), true_for = i.a[5];
  u32 results[32], third[32];
  for (int lane = 0; lane < 32; lane++) {
    T a = get<T>(x, lane), b = get<T>(y, lane);
    u32 relation = u32(a < b) | u32(a == b) << 1 | u32(a > b) << 2;
    results[lane] = ((relation ? relation : 8) & true_for) != 0;
  }
  bool joins = i.a[4] >= 0;
  if (joins) memcpy(third, w.slot(i.a[4]), sizeof third);
  for (int opposite = 0; opposite < 2; opposite++)
    if (i.a[opposite] >= 0)
      keep_active<u32>(w.slot(i.a[opposite]), active, [&](int lane) {
        u32 result = results[lane] ^ u32(opposite);
        return joins ? joined(result, third[lane], i.a[6]) : result;
      });
}
template <class... T> void comparisons() {
  (normal(std::string("setp.") + type_name<T>(), compare<T>), ...);
}
Register setp([] { comparisons<s16, u16, s32, u32, s64, u64, f16, bf16, f32, f64>(); });

// Between integers: a = [d, bits of its register, x, bits of its register, bits of the type from,
// whether it is signed, bits of the type to, whether it is signed].
Register integer_conversions([] {
  auto run = [](Machine&, Warp& w, const Instruction& i, u32 active) {
    u64 values[32];
    for (int lane = 0; lane < 32; lane++)
      values[lane] =
          extended(extended(raw(w, i.a[2], i.a[3], lane), i.a[4], i.a[5]), i.a[6], i.a[7]);
    put_raw(w, i.a[0], i.a[1], active, values);
  };
  normal("cvt.integer", run);
});

// From or to a float, by way of float64, which holds all of these exactly.  a = [d, x, rounding to
// an integer: n 0, z 1, m 2, p 3, none -1; whether it saturates to [0, 1]].
inline f64 rounded(f64 x, s64 how) {
  switch (how) {
    case 0: return std::nearbyint(x);
    case 1: return std::trunc(x);
    case 2: return std::floor(x);
    case 3: return std::ceil(x);
    default: return x;
  }
}
template <class T> T from_double(f64 x) {
  if constexpr (std::is_integral_v<T>) {
    using Limits = std::numeric_limits<T>;
    if (x != x) return 0;
    if (x <= f64(Limits::min())) return Limits::min();
    return x >= f64(Limits::max()) ? Limits::max() : T(x);
  } else if constexpr (sizeof(T) == 8) {
    return x;
  } else {
    return f32(x);
  }
}
template <class To, class From> void convert(Machine&, Warp& w, const Instruction& i, u32 active) {
  const u32* from = w.slot(i.a[1]);
  keep_active<To>(w.slot(i.a[0]), active, [&](int lane) {
    From x = get<From>(from, lane);
    if constexpr (std::is_same_v<To, f32> && sizeof(From) == 2)
      if (i.a[2] < 0 && !i.a[3]) return f32(x);
    f64 value = rounded(f64(x), i.a[2]);
    return from_double<To>(i.a[3] ? value != value ? 0 : std::clamp(value, 0.0, 1.0) : value);
  });
}
template <class Float, class... T> void conversions_with(T*...) {
  std::string name = type_name<Float>();
  (normal("cvt." + name + "." + type_name<T>(), convert<Float, T>), ...);
  (normal(std::string("cvt.") + type_name<T>() + "." + name, convert<T, Float>), ...);
}
template <class... Float> void conversions() {
  (conversions_with<Float>((Float*)nullptr..., (s16*)nullptr, (u16*)nullptr, (s32*)nullptr, (u32*)nullptr), ...);
}
Register float_conversions([] {
  conversions<f16, bf16, f32, f64>();
  normal("cvt.f64.s64", convert<f64, s64>);
  normal("cvt.s64.f32", convert<s64, f32>);
  normal("cvt.s64.f64", convert<s64, f64>);
  auto cut = [](f32 a) { return a != a ? 0x7fff : std::bit_cast<u32>(a) >> 16; };
  lanes<u16, f32>("cvt.rz.bf16.f32", cut);
  lanes<u32, f32, f32>("cvt.rz.bf16x2.f32", [](f32 high, f32 low) {
    decltype(cut) f;
    return u32(f(high)) << 16 | f(low);
  });
  lanes<bf16x2, f32, f32>("cvt.bf16x2.f32", [](f32 high, f32 low) { return bf16x2{low, high}; });
  lanes<f16x2, f32, f32>("cvt.f16x2.f32", [](f32 high, f32 low) { return f16x2{low, high}; });
  lanes<f16x2, u16>("cvt.f16x2.e4m3x2", [](u16 a) { return f16x2{e4m3(a), e4m3(a >> 8)}; });
  lanes<f16x2, u16>("cvt.f16x2.e5m2x2", [](u16 a) { return f16x2{e5m2(a), e5m2(a >> 8)}; });
  lanes<u32, u32>("cvt.rna.tf32.f32", [](u32 a) {
    bool nan = (a & 0x7fffffff) > 0x7f800000;
    return (nan ? a : a + 0x1000) & 0xffffe000;
  });
});

// mov of parts: a = [whole, bits of it, parts ...], a part being -1 where nobody wants it.
Register packing([] {
  normal("pack", [](Machine&, Warp& w, const Instruction& i, u32 active) {
    s64 count = i.a.size() - 2, bits = i.a[1] / count;
    u64 values[32] = {};
    for (int part = 0; part < count; part++)
      for (int lane = 0; lane < 32; lane++)
        values[lane] |= u64(extended(w.slot(i.a[2 + part])[lane], bits, false)) << (bits * part);
    put_raw(w, i.a[0], i.a[1], active, values);
  });
  normal("unpack", [](Machine&, Warp& w, const Instruction& i, u32 active) {
    s64 count = i.a.size() - 2, bits = i.a[1] / count;
    u64 values[32];
    for (int lane = 0; lane < 32; lane++) values[lane] = raw(w, i.a[0], i.a[1], lane);
    for (int part = 0; part < count; part++) {
      u64 pieces[32];
      for (int lane = 0; lane < 32; lane++)
        pieces[lane] = extended(values[lane] >> (bits * part), bits, false);
      if (i.a[2 + part] >= 0) put_raw(w, i.a[2 + part], bits, active, pieces);
    }
  });
});

// Shared memory with vector clocks, and global memory, where every byte has an owner.
#pragma once
#include "machine.h"

inline void inside(const Machine& m, u64 address, u64 size) {
  if (address >= SHARED_START && address + size <= u64(SHARED_START) + m.launch.shared) return;
  fail("shared address " + std::to_string(s64(address - SHARED_START)) + " of " +
       std::to_string(size) + " bytes is outside of " + std::to_string(m.launch.shared));
}
template <class F> void granules(const Machine& m, u32 address, u32 size, F f) {
  int shift = std::countr_zero(u64(m.launch.granule));  // a power of two
  u32 last = (address + size - 1 - SHARED_START) >> shift;
  for (u32 g = (address - SHARED_START) >> shift; g <= last; g++) f(g);
}

// The rules of shared memory and tensor memory.  `at` is the address in reports of the next access
// to a cell; `order` belongs to tcgen05.mma.
inline bool unordered(const Warp& w, const Written& last, u64 order) {
  return last.agent >= 0 && last.agent != w.id && w.clock[last.agent] < last.clock &&
         (!order || order != last.order);
}
// An access for a warp; `async`: through the async proxy.
inline void check_read(Machine& m, const Warp& w, const Written& last, s64 at, bool async,
                       u64 order = 0) {
  if (last.in_flight) m.find(IN_FLIGHT, m.pc, last.pc, at, w);
  if (last.agent < 0)
    m.find(UNINITIALIZED, m.pc, -1, at, w);
  else if (unordered(w, last, order))
    m.find(RAW, m.pc, last.pc, at, w);
  else if (async && last.generic && w.fenced[last.agent] < last.clock)
    m.find(NO_FENCE, m.pc, last.pc, at, w);
}
// `same`: it writes the value that the cell already has.
inline void check_write(Machine& m, const Warp& w, const Shadow& shadow, size_t cell, s64 at,
                        bool same = false, u64 order = 0) {
  const Written& last = shadow.written[cell];
  if (last.in_flight) m.find(IN_FLIGHT, m.pc, last.pc, at, w);
  if (unordered(w, last, order) && !same) m.find(WAW, m.pc, last.pc, at, w);
  const u32* reads = &shadow.read_clock[cell * shadow.readers];
  bool early = false;
  for (size_t n = 0; n < shadow.readers; n++) early |= reads[n] > w.clock[n];
  if (!early) return;
  int who = 0;
  while (reads[who] <= w.clock[who]) who++;
  m.find(WAR, m.pc, shadow.read_pc[cell * shadow.readers + who], at, w);
}
inline void note_reader(const Machine& m, Shadow& shadow, size_t cell, int agent, u32 clock) {
  shadow.read_clock[cell * shadow.readers + agent] = clock;
  shadow.read_pc[cell * shadow.readers + agent] = m.pc;
}

// `agent` reads shared memory at its time `clock`.
inline void note_read(Machine& m, const Warp& w, u32 address, u32 size, int agent, u32 clock,
                      bool async) {
  if (!m.launch.check) return;
  granules(m, address, size, [&](u32 g) {
    check_read(m, w, m.shadow.written[g], address - SHARED_START, async);
    note_reader(m, m.shadow, g, agent, clock);
  });
}
inline void note_read(Machine& m, const Warp& w, u32 address, u32 size) {
  note_read(m, w, address, size, w.id, w.clock[w.id], false);
}

// A copy is in flight until it arrives.  Warps that store the value of a cell again don't race.
inline void note_write(Machine& m, const Warp& w, u32 address, u32 size, bool in_flight,
                       const void* data = nullptr) {
  if (!m.launch.check) return;
  bool same = data && !memcmp(m.bytes(address), data, size);
  granules(m, address, size, [&](u32 g) {
    check_write(m, w, m.shadow, g, address - SHARED_START, same);
    Written& last = m.shadow.written[g];
    if (!same || !unordered(w, last, 0)) last = {w.clock[w.id], m.pc, w.id, in_flight, true};
  });
}

// The bytes of a copy are NaN until they arrive, as a write of `agent` at its time `clock`.
inline void begin_copy(Machine& m, const Warp& w, u32 to, u32 size) {
  note_write(m, w, to, size, true);
  memset(m.bytes(to), 0xff, size);
}
inline void land(Machine& m, u32 to, const u8* data, u32 size, int pc, int agent, u32 clock,
                 bool generic) {
  memcpy(m.bytes(to), data, size);
  if (!m.launch.check) return;
  granules(m, to, size, [&](u32 g) { m.shadow.written[g] = {clock, pc, agent, false, generic}; });
}

inline Storage& storage_of(Machine& m, u64 address, u32 size, const char* what) {
  s64 nearest = INT64_MAX;
  for (Storage& s : m.storages) {
    s64 offset = address - s.start;
    const u8* allowed = s.allowed + offset;
    if (address >= s.start && address + size <= s.end &&
        std::all_of(allowed, allowed + size, [](u8 each) { return each; }))
      return s;
    if (std::abs(offset) < std::abs(nearest)) nearest = offset;
  }
  fail(std::string("global ") + what + " of " + std::to_string(size) + " bytes outside of every " +
       "tensor: " + std::to_string(nearest) + " bytes from the start of the nearest");
}

// The time of a warp's access, among all CTAs; and whether it is ordered before `w`'s current one.
inline u64 tag(const Machine& m, const Warp& w) {
  return u64(m.cta + 1) << 40 | u64(w.id) << 32 | w.clock[w.id];
}
inline bool before(const Machine& m, u64 tag, const Warp& w) {
  int other = tag >> 32 & 0xff;
  return tag >> 40 == u64(m.cta + 1) && (other == w.id || w.clock[other] >= u32(tag));
}
const u64 SEVERAL = ~0ull;  // readers of several CTAs

// `data`: the bytes of a store; stores of equal bytes by unordered warps are no race.
inline void global(Machine& m, const Warp& w, u64 address, u32 size, const u8* data, int pc) {
  bool write = data != nullptr;
  Storage& s = storage_of(m, address, size, write ? "store" : "load");
  if (!m.launch.check) return;
  u64 now = tag(m, w), offset = address - s.start;
  for (u64 n = offset; n < offset + size; n++) {
    u64 &writer = s.writers[n], &reader = s.readers[n];
    if (write) {
      bool other = writer && !before(m, writer, w) && *(u8*)(s.start + n) != data[n - offset];
      if (writer) m.find(other ? GLOBAL_RACE : TWICE, pc, -1, n, w);
      if (reader && (reader == SEVERAL || !before(m, reader, w))) m.find(GLOBAL_RACE, pc, -1, n, w);
      writer = now;
    } else {
      if (writer && !before(m, writer, w)) m.find(GLOBAL_RACE, pc, -1, n, w);
      reader = reader && reader >> 40 != now >> 40 ? SEVERAL : now;
    }
  }
}

// Loads and stores: [space, bytes of a part, whether it is signed, bits of a register, address,
// parts ...].
enum Space { PARAMETER_SPACE, GLOBAL_SPACE, SHARED_SPACE };
const int PARTS = 7;

// The storage of an access, if it is allowed.
inline u8* place(Step& s, int lane, bool write, const u8* data) {
  u32 size = s[1] * (s.count() - PARTS);
  u64 address = s.address(4, lane);
  if (address % size) fail("misaligned access of " + std::to_string(size) + " bytes");
  if (s[0] == GLOBAL_SPACE) {
    global(s.m, s.w, address, size, data, s.m.pc);
    return (u8*)address;
  }
  if (s[0] == PARAMETER_SPACE) {
    if (write || address + size > u64(s.m.launch.parameter_bytes)) fail("no such parameter");
    return (u8*)s.m.launch.parameters + address;
  }
  inside(s.m, address, size);
  if (write) note_write(s.m, s.w, address, size, false, data);
  else note_read(s.m, s.w, address, size);
  return s.m.bytes(address);
}
inline void load(Step& s) {
  each(s.active, [&](int lane) {
    const u8* from = place(s, lane, false, nullptr);
    for (size_t n = PARTS; n < s.count(); n++, from += s[1]) {
      if (s[n] < 0) continue;
      u64 value = 0;
      memcpy(&value, from, s[1]);
      value = extended(value, 8 * s[1], s[2]);
      if (s[3] == 64) put<u64>(s.slot(n), lane, value);
      else s.slot(n)[lane] = s[3] == 16 ? u16(value) : u32(value);
    }
  });
}
inline void store(Step& s) {
  each(s.active, [&](int lane) {
    u8 data[64];
    for (size_t n = PARTS; n < s.count(); n++) {
      u64 value = s.w.raw(s[n], s[3], lane);
      memcpy(data + (n - PARTS) * s[1], &value, s[1]);
    }
    memcpy(place(s, lane, true, data), data, s[1] * (s.count() - PARTS));
  });
}

// Matrices of 8 rows of 16 bytes: [whether they are transposed, address, registers ...].  The
// lanes give the addresses of rows, and each holds two elements of each matrix.
template <bool LOADS> void matrices(Step& s) {
  std::array<u64, 32> rows;
  for (size_t lane = 0; lane < 8 * (s.count() - 4); lane++) {
    rows.at(lane) = s.address(1, lane);
    if (rows[lane] % 16) fail("misaligned row of a matrix");
    inside(s.m, rows[lane], 16);
  }
  for (size_t n = 0; n < s.count() - 4; n++) {
    u16 matrix[64];
    u32* slot = s.slot(4 + n);
    for (int row = 0; row < 8 && LOADS; row++) {
      note_read(s.m, s.w, rows[8 * n + row], 16);
      memcpy(matrix + 8 * row, s.m.bytes(rows[8 * n + row]), 16);
    }
    for (int lane = 0; lane < 32; lane++) {
      int across = lane / 4, along = 2 * (lane % 4), step = s[0] ? 8 : 1;
      u16& low = matrix[s[0] ? 8 * along + across : 8 * across + along];
      u16& high = (&low)[step];
      if (LOADS) slot[lane] = u32(high) << 16 | low;
      else low = slot[lane], high = slot[lane] >> 16;
    }
    for (int row = 0; row < 8 && !LOADS; row++) {
      note_write(s.m, s.w, rows[8 * n + row], 16, false, matrix + 8 * row);
      memcpy(s.m.bytes(rows[8 * n + row]), matrix + 8 * row, 16);
    }
  }
}

inline Table memory_operations([] {
  normal("ld", load);
  normal("st", store);
  together("ldmatrix", matrices<true>);
  together("stmatrix", matrices<false>);
});

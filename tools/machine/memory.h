// Shared memory under vector clocks, and global memory, of which every byte has an owner.
#pragma once
#include "machine.h"

inline void Machine::find(Kind kind, int at, int other, s64 address, const Warp& w) {
  Finding first{kind, at, other, address, cta, w.id, 0};
  findings.try_emplace({kind, at, other}, first).first->second.count++;
}

inline void Machine::inside(u64 address, u64 size) {
  if (address >= SHARED_START && address + size <= u64(SHARED_START) + launch.shared) return;
  fail("shared address " + std::to_string(s64(address - SHARED_START)) + " of " +
       std::to_string(size) + " bytes is outside of " + std::to_string(launch.shared));
}

// The granules of an access: f(their index).
template <class F> void granules(const Machine& m, u32 address, u32 size, F f) {
  u32 first = (address - SHARED_START) / m.launch.granule;
  u32 last = (address + size - 1 - SHARED_START) / m.launch.granule;
  for (u32 g = first; g <= last; g++) f(g);
}

// `agent` reads at its time `clock`, on behalf of a warp; `async`: through the async proxy.
inline void Machine::note_read(const Warp& w, u32 address, u32 size, int at, int agent, u32 clock,
                               bool async) {
  if (!launch.check) return;
  granules(*this, address, size, [&](u32 g) {
    const Written& last = written[g];
    if (last.in_flight) find(IN_FLIGHT, at, last.pc, address, w);
    if (last.agent < 0)
      find(UNINITIALISED, at, -1, address, w);
    else if (last.agent != w.id && w.clock[last.agent] < last.clock)
      find(RAW, at, last.pc, address, w);
    else if (async && last.generic && w.fenced[last.agent] < last.clock)
      find(NO_PROXY_FENCE, at, last.pc, address, w);
    read_clock[size_t(g) * readers + agent] = clock;
    read_pc[size_t(g) * readers + agent] = at;
  });
}
inline void Machine::note_read(const Warp& w, u32 address, u32 size) {
  note_read(w, address, size, pc, w.id, w.clock[w.id], false);
}

// A copy is in flight until `land`.  Warps that store what is there already don't race with it.
inline void Machine::note_write(const Warp& w, u32 address, u32 size, bool in_flight,
                                const u8* data) {
  if (!launch.check) return;
  bool same = data && !memcmp(bytes(address), data, size);
  granules(*this, address, size, [&](u32 g) {
    Written& last = written[g];
    if (last.in_flight) find(IN_FLIGHT, pc, last.pc, address, w);
    bool unordered = last.agent >= 0 && last.agent != w.id && w.clock[last.agent] < last.clock;
    if (unordered && !same) find(WAW, pc, last.pc, address, w);
    const u32* reads = &read_clock[size_t(g) * readers];
    bool early = false;
    for (int i = 0; i < readers; i++) early |= reads[i] > w.clock[i];
    if (early) {
      int who = 0;
      while (reads[who] <= w.clock[who]) who++;
      find(WAR, pc, read_pc[size_t(g) * readers + who], address, w);
    }
    if (!(unordered && same)) last = {w.clock[w.id], pc, w.id, in_flight, true};
  });
}

// The bytes of a copy arrive, as a write of `agent` at its time `clock`.
inline void Machine::land(u32 address, const u8* data, u32 size, int at, int agent, u32 clock,
                          bool generic) {
  memcpy(bytes(address), data, size);
  if (!launch.check) return;
  granules(*this, address, size, [&](u32 g) { written[g] = {clock, at, agent, false, generic}; });
}

inline Storage* Machine::storage_of(u64 address, u32 size) {
  auto after = [](u64 a, const Storage& s) { return a < s.start; };
  auto next = std::upper_bound(storages.begin(), storages.end(), address, after);
  if (next == storages.begin()) return nullptr;
  Storage* found = &*--next;
  if (address + size > found->end) return nullptr;
  const u8* allowed = found->allowed + (address - found->start);
  return std::all_of(allowed, allowed + size, [](u8 each) { return each; }) ? found : nullptr;
}

// When a warp did something, among all CTAs; and whether that is before what `w` does now.
inline u64 Machine::tag(const Warp& w) const {
  return u64(cta + 1) << 40 | u64(w.id) << 32 | w.clock[w.id];
}
inline bool Machine::before(u64 tag, const Warp& w) const {
  u32 other = tag >> 32 & 0xff;
  return tag >> 40 == u64(cta + 1) && (other == u32(w.id) || w.clock[other] >= u32(tag));
}

inline void Machine::global(const Warp& w, u64 address, u32 size, bool write, int at) {
  Storage* s = storage_of(address, size);
  if (!s) {
    std::string what = write ? "global store of " : "global load of ";
    s64 nearest = INT64_MAX;
    for (auto& each : storages)
      if (std::abs(s64(address - each.start)) < std::abs(nearest)) nearest = address - each.start;
    fail(what + std::to_string(size) + " bytes outside of every tensor: " +
         std::to_string(nearest) + " bytes from the start of the nearest");
  }
  if (!launch.check) return;
  u64 now = tag(w), offset = address - s->start;
  for (u64 i = offset; i < offset + size; i++) {
    u64 &writer = s->writers[i], &reader = s->readers[i];
    if (write) {
      if (writer) find(STORED_TWICE, at, -1, i, w);
      if (reader && (reader == SEVERAL || !before(reader, w))) find(GLOBAL_RACE, at, -1, i, w);
      writer = now;
    } else {
      if (writer && !before(writer, w)) find(GLOBAL_RACE, at, -1, i, w);
      reader = reader && reader >> 40 != now >> 40 ? SEVERAL : now;
    }
  }
}

// Loads and stores: a = [space, bytes of a part, whether it is signed, bits of a register, address,
// parts ...], an address being [slot, bits of it, offset].
enum Space { PARAMETER_SPACE, GLOBAL_SPACE, SHARED_SPACE };
const int ADDRESS = 4, PARTS = 7;

inline u64 address_of(Warp& w, const Instruction& i, int at, int lane) {
  return raw(w, i.a[at], i.a[at + 1], lane) + i.a[at + 2];
}
inline int only_lane(u32 active) {
  if (active & (active - 1)) fail("more than one thread is here");
  return std::countr_zero(active);
}

// Where an access goes; a generic address says so itself.
inline Space space_of(const Instruction& i, u64& address, u32 size) {
  Space space = Space(i.a[0]);
  if (address % size) fail("misaligned access of " + std::to_string(size) + " bytes");
  if (space != GLOBAL_SPACE || address < PARAMETERS) return space;
  space = address >= SHARED ? SHARED_SPACE : PARAMETER_SPACE;
  address -= space == SHARED_SPACE ? SHARED : PARAMETERS;
  return space;
}

inline void load_lane(Machine& m, Warp& w, const Instruction& i, int lane) {
  u32 part = i.a[1], size = part * (i.a.size() - PARTS);
  u64 address = address_of(w, i, ADDRESS, lane);
  Space space = space_of(i, address, size);
  const u8* from = reinterpret_cast<const u8*>(address);
  if (space == GLOBAL_SPACE) {
    m.global(w, address, size, false, m.pc);
  } else if (space == SHARED_SPACE) {
    m.inside(address, size);
    m.note_read(w, address, size);
    from = m.bytes(address);
  } else {
    if (address + size > u64(m.launch.parameter_bytes)) fail("no such parameter");
    from = m.launch.parameters + address;
  }
  for (size_t n = PARTS; n < i.a.size(); n++, from += part) {
    if (i.a[n] < 0) continue;
    u64 value = 0;
    memcpy(&value, from, part);
    value = extended(value, 8 * part, i.a[2]);
    if (i.a[3] == 64)
      w.wide(i.a[n])[lane] = value;
    else
      w.slot(i.a[n])[lane] = i.a[3] == 16 ? u16(value) : u32(value);
  }
}

inline void store_lane(Machine& m, Warp& w, const Instruction& i, int lane) {
  u32 part = i.a[1], size = part * (i.a.size() - PARTS);
  u64 address = address_of(w, i, ADDRESS, lane);
  Space space = space_of(i, address, size);
  u8 data[64];
  for (size_t n = PARTS; n < i.a.size(); n++) {
    u64 value = raw(w, i.a[n], i.a[3], lane);
    memcpy(data + (n - PARTS) * part, &value, part);
  }
  if (space == GLOBAL_SPACE) {
    m.global(w, address, size, true, m.pc);
    memcpy(reinterpret_cast<void*>(address), data, size);
  } else if (space == SHARED_SPACE) {
    m.inside(address, size);
    m.note_write(w, address, size, false, data);
    memcpy(m.bytes(address), data, size);
  } else {
    fail("a store to a parameter");
  }
}

// Matrices of 8 rows of 16 bytes: a = [whether they are transposed, address, registers ...].  The
// lanes give the addresses of rows, and each holds two halves of each matrix.
const int MATRICES = 4;
inline std::array<u32, 32> matrix_rows(Machine& m, Warp& w, const Instruction& i) {
  std::array<u32, 32> rows;
  for (size_t lane = 0; lane < 8 * (i.a.size() - MATRICES); lane++) {
    u64 address = address_of(w, i, 1, lane);
    if (address % 16) fail("misaligned row of a matrix");
    m.inside(address, 16);
    rows[lane] = address;
  }
  return rows;
}
// The place of a lane's lower (0) or upper (1) half: row and column.
inline std::pair<int, int> half_at(int lane, int half, bool transposed) {
  int group = lane / 4, inner = 2 * (lane % 4) + half;
  return transposed ? std::pair(inner, group) : std::pair(group, inner);
}
inline void ldmatrix(Machine& m, Warp& w, const Instruction& i, u32) {
  auto rows = matrix_rows(m, w, i);
  for (size_t n = 0; n < i.a.size() - MATRICES; n++) {
    u16 matrix[8][8];
    for (int row = 0; row < 8; row++) {
      m.note_read(w, rows[8 * n + row], 16);
      memcpy(matrix[row], m.bytes(rows[8 * n + row]), 16);
    }
    for (int lane = 0; lane < 32; lane++) {
      auto [r0, c0] = half_at(lane, 0, i.a[0]);
      auto [r1, c1] = half_at(lane, 1, i.a[0]);
      w.slot(i.a[MATRICES + n])[lane] = u32(matrix[r1][c1]) << 16 | matrix[r0][c0];
    }
  }
}
inline void stmatrix(Machine& m, Warp& w, const Instruction& i, u32) {
  auto rows = matrix_rows(m, w, i);
  for (size_t n = 0; n < i.a.size() - MATRICES; n++) {
    u16 matrix[8][8];
    for (int lane = 0; lane < 32; lane++)
      for (int half = 0; half < 2; half++) {
        auto [row, column] = half_at(lane, half, i.a[0]);
        matrix[row][column] = w.slot(i.a[MATRICES + n])[lane] >> (16 * half);
      }
    for (int row = 0; row < 8; row++) {
      const u8* data = reinterpret_cast<const u8*>(matrix[row]);
      m.note_write(w, rows[8 * n + row], 16, false, data);
      memcpy(m.bytes(rows[8 * n + row]), data, 16);
    }
  }
}

inline Register memory_operations([] {
  normal("ld", [](Machine& m, Warp& w, const Instruction& i, u32 active) {
    active_lanes(active, [&](int lane) { load_lane(m, w, i, lane); });
  });
  normal("st", [](Machine& m, Warp& w, const Instruction& i, u32 active) {
    active_lanes(active, [&](int lane) { store_lane(m, w, i, lane); });
  });
  together("ldmatrix", ldmatrix);
  together("stmatrix", stmatrix);
});

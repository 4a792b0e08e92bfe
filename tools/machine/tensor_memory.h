// Blackwell's tensor memory: 128 lanes by 512 columns of words for a CTA.  Loads and stores of warps
// are in flight until their wait.
#pragma once
#include "copies.h"

const u32 LANES = 128, COLUMNS = 512;
const u32 BLOCK = 16;  // lanes of a column in one cell of its shadow

inline u32& word_at(TensorMemory& t, u32 lane, u32 column) {
  return t.words[lane * COLUMNS + column];
}
inline size_t cell_of(u32 lane, u32 column) { return lane / BLOCK * COLUMNS + column; }
// The cells of these lanes and columns, which must be allocated.
template <class F> void cells(TensorMemory& t, u32 lane, u32 column, u32 columns, F f) {
  for (u32 c = column; c < column + columns; c++) {
    if (lane >= LANES || c >= COLUMNS || t.words.empty() || !t.taken[c])
      fail("tensor memory that nobody has allocated");
    f(cell_of(lane, c), c);
  }
}

// [the place for its address in shared memory, columns].  Every second CTA gets the last columns
// first, so that the use of an address without the allocated start is found.
inline void allocate(Step& s) {
  TensorMemory& t = s.m.tensor_memory;
  u32 count = s[3], to = s.address(0, std::countr_zero(s.active));
  if (count < 32 || count > COLUMNS || !std::has_single_bit(count)) fail("a number of columns");
  if (t.relinquished) fail("an allocation after the right to it was given up");
  if (t.words.empty()) {
    t.words.assign(LANES * COLUMNS, UNWRITTEN);
    t.taken.assign(COLUMNS, 0);
    t.shadow.start(s.m.launch.check ? LANES / BLOCK * COLUMNS : 0, s.m.readers);
  }
  for (u32 n = 0; n < COLUMNS; n += count) {
    u32 first = s.m.cta % 2 ? COLUMNS - count - n : n;
    auto begin = t.taken.begin() + first, end = begin + count;
    if (std::find(begin, end, 1) != end) continue;
    std::fill(begin, end, 1);
    inside(s.m, to, 4);
    note_write(s.m, s.w, to, 4, false);
    memcpy(s.m.bytes(to), &first, 4);
    return;
  }
  fail("no tensor memory is left");
}
// [address, columns].  All accesses to them must have ended.
inline void deallocate(Step& s) {
  TensorMemory& t = s.m.tensor_memory;
  u32 first = s.slot(0)[std::countr_zero(s.active)], count = s[1];
  if (!t.products.none()) fail("tensor memory goes while a product is on its way");
  for (u32 lane = 0; lane < LANES; lane += BLOCK)
    cells(t, lane, first, count, [&](size_t cell, u32 column) {
      if (!s.m.launch.check) return;
      check_write(s.m, s.w, t.shadow, cell, column);
      t.shadow.written[cell] = {};
      std::fill_n(&t.shadow.read_clock[cell * t.shadow.readers], t.shadow.readers, 0);
    });
  std::fill_n(&t.taken[first], count, 0);
}
inline void end_tensor_memory(const Machine& m) {
  const TensorMemory& t = m.tensor_memory;
  if (!t.products.none()) fail("a product is never waited for");
  if (std::find(t.taken.begin(), t.taken.end(), 1) != t.taken.end())
    fail("tensor memory is never given back");
}

// Loads and stores: [shape, address, distance of the second half or -1, registers ...], all 32
// lanes at one address.  A warp can access the 32 lanes of its position in its warp group.
enum Shape { S32X32B, S16X32BX2, S16X256B };
// f(register, lane of the warp, lane there, column).
template <class F> void words(Step& s, F f) {
  const u32* addresses = s.slot(1);
  bool same = std::all_of(addresses, addresses + 32, [&](u32 a) { return a == *addresses; });
  if (s.active != ALL_LANES || !same) fail("tensor memory for some lanes, or at unlike addresses");
  u32 address = s.address(1, 0), first = address >> 16, column = address & 0xffff;
  u32 half = std::max(s64(0), s[4]), reached = 32 * (s.w.id % 4);
  if (first != reached && (s[0] == S32X32B || first != reached + 16)) fail("lanes of another warp");
  for (u32 r = 0; r < s.count() - TensorLoad::REGISTERS; r++)
    for (u32 lane = 0; lane < 32; lane++) switch (s[0]) {
        case S32X32B: f(r, lane, first + lane, column + r); break;
        case S16X32BX2:  // the upper lanes of the warp have the second half
          f(r, lane, first + lane % 16 + lane / 16 * (half >> 16),
            column + r + lane / 16 * (half & 0xffff));
          break;
        case S16X256B:  // in the layout of mma's sums
          f(r, lane, first + lane / 4 + 8 * (r / 2 % 2),
            column + 8 * (r / 4) + 2 * (lane % 4) + r % 2);
      }
}
// The accessed cells, each once: f(cell, column).
template <class F> void touched_cells(Step& s, F f) {
  TensorMemory& t = s.m.tensor_memory;
  std::vector<bool> seen(LANES / BLOCK * COLUMNS);
  words(s, [&](u32, u32, u32 lane, u32 column) {
    cells(t, lane, column, 1, [&](size_t cell, u32) {
      if (!seen[cell] && s.m.launch.check) f(cell, column);
      seen[cell] = true;
    });
  });
}
const u32 UNTIL_WAITED = ~0u;

inline void load_tensor(Step& s) {
  TensorMemory& t = s.m.tensor_memory;
  touched_cells(s, [&](size_t cell, u32 column) {
    check_read(s.m, s.w, t.shadow.written[cell], column, false);
    note_reader(s.m, t.shadow, cell, s.w.id, UNTIL_WAITED);
    s.w.reads_tensor.push_back(cell);
  });
  TensorLoad load{&s.i, std::vector<u32>(32 * (s.count() - TensorLoad::REGISTERS))};
  words(s, [&](u32 r, u32 lane, u32 row, u32 column) {
    load.data[32 * r + lane] = word_at(t, row, column);
  });
  load.registers([&](s64 slot, const u32*) { std::fill_n(s.w.slot(slot), 32, UNWRITTEN); });
  s.w.tensor_loads.push_back(std::move(load));
  mark_busy(s.w);
}
inline void wait_tensor_loads(Step& s) {
  Shadow& shadow = s.m.tensor_memory.shadow;
  land_tensor_loads(s.w);
  for (size_t cell : s.w.reads_tensor)
    shadow.read_clock[cell * shadow.readers + s.w.id] = s.w.clock[s.w.id];
  s.w.reads_tensor.clear();
}
inline void store_tensor(Step& s) {
  TensorMemory& t = s.m.tensor_memory;
  touched_cells(s, [&](size_t cell, u32 column) {
    check_write(s.m, s.w, t.shadow, cell, column);
    t.shadow.written[cell] = {s.w.clock[s.w.id], s.m.pc, s.w.id, true};
    s.w.writes_tensor.push_back(cell);
  });
  words(s, [&](u32 r, u32 lane, u32 row, u32 column) {
    word_at(t, row, column) = s.slot(TensorLoad::REGISTERS + r)[lane];
  });
}
inline void wait_tensor_stores(Step& s) {
  for (size_t cell : s.w.writes_tensor) {
    Written& written = s.m.tensor_memory.shadow.written[cell];
    written.in_flight = false;
    written.clock = s.w.clock[s.w.id];
  }
  s.w.writes_tensor.clear();
}

inline Table tensor_memory_operations([] {
  together("tcgen05.alloc", allocate);
  together("tcgen05.dealloc", deallocate);
  together("tcgen05.relinquish_alloc_permit",
           [](Step& s) { s.m.tensor_memory.relinquished = true; });
  together("tcgen05.ld", load_tensor);
  together("tcgen05.st", store_tensor);
  together("tcgen05.wait::ld", wait_tensor_loads);
  together("tcgen05.wait::st", wait_tensor_stores);
});

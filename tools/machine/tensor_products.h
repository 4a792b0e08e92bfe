// Blackwell's products (tcgen05.mma), whose sums are in tensor memory.  One thread starts them, and
// they run asynchronously: in their order, and only when a wait for a later commit ends.
#pragma once
#include "tensor_memory.h"

// [kind: of 16 bits, TF32 or int8, address of the sums, whether A is in tensor memory, its address there
// or its descriptor, B's descriptor, the instruction's, whether to add].
enum { KIND, SUMS_AT, A_IN_TENSOR_MEMORY = 4, A_AT, B_AT = 8, HOW, ADDS_TO };

// The fields of an instruction's descriptor.
inline TensorProduct described(s64 kind, u32 how) {
  TensorProduct p{};
  u32 type_a = how >> 7 & 7, type_b = how >> 10 & 7, sparse = how & 7, saturates = how >> 3 & 1;
  u32 sums_type = how >> 4 & 3, negated = how >> 13 & 3, shifted = how >> 29;
  bool right_sums = sums_type == (kind == S8 ? 2 : 1);  // int32 or float32
  if (sparse || (saturates && kind != S8) || !right_sums || negated || shifted || type_a != type_b)
    fail("a product of another kind");
  if (kind == S8 ? type_a != 1 : kind == TF32 ? type_a != TF32 : type_a > BF16)
    fail("a product of another type");
  p.type = kind == S8 ? s64(S8) : type_a;
  p.rows_together_a = how >> 15 & 1;
  p.rows_together_b = how >> 16 & 1;
  p.columns = (how >> 17 & 63) * 8;
  p.rows = (how >> 24 & 31) * 16;
  p.depth = 32 / size_of(p.type);
  bool fits = p.rows == 64 ? p.columns % 8 == 0 : p.rows == 128 && p.columns % 16 == 0;
  if (!fits || !p.columns || p.columns > 256) fail("a product of another shape");
  if (p.type == TF32 && (p.rows_together_a || p.rows_together_b)) fail("rows of TF32 together");
  return p;
}
// Rows and sums are in blocks of 16: 64 rows use the first or the last half of each 32 lanes.
inline u32 lane_of(const TensorProduct& p, int row) {
  return p.lane + (p.rows == 128 ? row : row / 16 * 32 + row % 16);
}
inline Operand operand_a(const TensorProduct& p, int row, int rows) {
  return {p.a, p.type, row, rows, p.depth, p.rows_together_a};
}
inline Operand operand_b(const TensorProduct& p) {
  return {p.b, p.type, 0, p.columns, p.depth, p.rows_together_b};
}

// The start of a product: its operands in shared memory and its sums are busy until its wait.
inline void begin_product(Step& s) {
  TensorMemory& t = s.m.tensor_memory;
  int lane = s.only_lane(), agent = s.m.tensor_agent();
  if (t.issuer != s.w.id && !t.products.none()) fail("two warps have products");
  t.issuer = s.w.id;
  u32 to = s.address(SUMS_AT, lane), how = s.slot(HOW)[lane], clock = t.products.committed + 1;
  TensorProduct p = described(s[KIND], how);
  p.adds = s.slot(ADDS_TO)[lane];
  p.a_in_tensor_memory = s[A_IN_TENSOR_MEMORY];
  p.a = s.address(A_AT, lane), p.b = get<u64>(s.slot(B_AT), lane);
  p.lane = to >> 16, p.column = to & 0xffff, p.column_a = p.a & 0xffff;
  if (p.lane && (p.rows == 128 || p.lane != 16)) fail("a lane of sums");
  if (p.a_in_tensor_memory && (p.a >> 16 != p.lane || p.rows_together_a)) fail("a lane of A");

  auto reads_shared = [&](const Operand& operand) {
    bool known = (operand.descriptor >> 46 & 0xffff) == 1;  // its version, no offset, a swizzle
    if (!known) fail("a descriptor of another kind");
    operand.pieces([&](int, int, u32 address) {
      inside(s.m, address, 16);
      note_read(s.m, s.w, address, 16, agent, clock, true);
    });
  };
  reads_shared(operand_b(p));
  if (!p.a_in_tensor_memory) reads_shared(operand_a(p, 0, p.rows));

  u64 order = u64(to) << 32 | how;  // products with the same sums and shape run one after the other
  for (int row = 0; row < p.rows; row += 16) {
    u32 lane = lane_of(p, row), words_a = p.a_in_tensor_memory ? 8 : 0;  // words of A in each row
    cells(t, lane, p.column_a, words_a, [&](size_t cell, u32 column) {
      if (!s.m.launch.check) return;
      check_read(s.m, s.w, t.shadow.written[cell], column, false);
      note_reader(s.m, t.shadow, cell, agent, clock);
    });
    cells(t, lane, p.column, p.columns, [&](size_t cell, u32 column) {
      if (!s.m.launch.check) return;
      Written& last = t.shadow.written[cell];
      if (p.adds) check_read(s.m, s.w, last, column, false, order);
      check_write(s.m, s.w, t.shadow, cell, column, false, order);
      last = {clock, s.m.pc, agent, false, false, order};
    });
  }
  t.products.open.push_back(p);
}
// [mbarrier].
inline void commit_products(Step& s) {
  TensorMemory& t = s.m.tensor_memory;
  u32 barrier = s.address(0, s.only_lane());
  barrier_at(s, barrier);
  t.products.commit();
  t.arrivals.push_back(barrier);
}

inline void run_product(Machine& m, const TensorProduct& p) {
  TensorMemory& t = m.tensor_memory;
  operand_b(p).read(m, tile_b[0], 1, 256);
  for (int row = 0; row < p.rows; row += 16) {
    auto sum = [&](int r, int n) -> u32& { return word_at(t, lane_of(p, row + r), p.column + n); };
    if (!p.a_in_tensor_memory) operand_a(p, row, 16).read(m, tile_a[0], 32, 1);
    for (int r = 0; r < 16; r++) {
      for (int k = 0; k < p.depth && p.a_in_tensor_memory; k++) {
        int size = size_of(p.type), in_word = 4 / size;
        u32 word = word_at(t, lane_of(p, row + r), p.column_a + k / in_word);
        tile_a[r][k] = number(p.type, word >> (8 * size * (k % in_word)));
      }
      for (int n = 0; n < p.columns; n++)
        sum_bits[r][n] = p.adds ? sum(r, n) : 0;
    }
    multiply_tiles(p.type, p.depth, p.columns);
    for (int r = 0; r < 16; r++)
      for (int n = 0; n < p.columns; n++) sum(r, n) = sum_bits[r][n];
  }
}
// Run all products up to the first commit that arrives at this mbarrier; false if there is none.
inline bool run_committed(Machine& m, u32 address) {
  TensorMemory& t = m.tensor_memory;
  if (std::find(t.arrivals.begin(), t.arrivals.end(), address) == t.arrivals.end()) return false;
  for (u32 arrives_at = 0; arrives_at != address; t.arrivals.pop_front()) {
    u32 over = t.products.wait(t.arrivals.size() - 1,
                               [&](TensorProduct& each) { run_product(m, each); });
    arrives_at = t.arrivals.front();
    Barrier& b = m.barriers[arrives_at];
    if (!b.valid) fail("a commit's mbarrier is gone");
    b.clock[m.tensor_agent()] = std::max(b.clock[m.tensor_agent()], over);
    b.arrive();
  }
  return true;
}

inline Table tensor_products([] {
  normal("tcgen05.mma", begin_product);
  normal("tcgen05.commit", commit_products);
});

// Tensor cores: mma, and wgmma, which reads its operands when a wait for it ends.  Products are
// exact; sums are rounded to float32 after each product, in the order of k.  Products of int8 have
// sums in int32.
#pragma once
#include "memory.h"

enum Type { F16, BF16, TF32, S8 };
inline int size_of(s64 type) { return type == S8 ? 1 : type == TF32 ? 4 : 2; }
inline f32 number(s64 type, u32 bits) {  // tensor cores ignore a float32's low bits
  if (type == S8) return s8(bits);
  if (type == TF32) return std::bit_cast<f32>(bits & 0xffffe000u);
  return type == BF16 ? f32(std::bit_cast<bf16>(u16(bits))) : f32(std::bit_cast<f16>(u16(bits)));
}

// A warp's 16 rows of A [16, k], B [k, n], and sums [16, n].
inline f32 tile_a[16][32], tile_b[32][256];
static union { f32 sums[16][256]; s32 whole[16][256]; u32 sum_bits[16][256]; };

inline void multiply_tiles(s64 type, int k_size, int n_size) {
  if (type == S8) {
    for (int row = 0; row < 16; row++)
      for (int k = 0; k < k_size; k++)
        for (int n = 0; n < n_size; n++) whole[row][n] += s32(tile_a[row][k] * tile_b[k][n]);
    return;
  }
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < k_size; k++)
      for (int n = 0; n < n_size; n++) sums[row][n] += tile_a[row][k] * tile_b[k][n];
  for (auto& row : sums)
    for (int n = 0; n < n_size; n++) row[n] = canonical(row[n]);
}
// A register of an operand holds for each lane one float32, or halves or bytes adjacent in k:
// f(row of eight, k, value).
template <class F> void fragment(s64 type, const u32* slot, F f) {
  int size = size_of(type), parts = 4 / size;
  for (int lane = 0; lane < 32; lane++)
    for (int n = 0; n < parts; n++)
      f(lane / 4, lane % 4 * parts + n, number(type, slot[lane] >> (8 * size * n)));
}
inline void read_a(s64 type, const u32* slot, int r) {
  int k0 = 16 / size_of(type) * (r / 2);
  fragment(type, slot, [&](int row, int k, f32 x) { tile_a[row + 8 * (r % 2)][k0 + k] = x; });
}
inline void read_b(s64 type, const u32* slot, int r) {
  int k0 = 16 / size_of(type) * r;
  fragment(type, slot, [&](int n, int k, f32 x) { tile_b[k0 + k][n] = x; });
}
inline u32& sum_at(int lane, int r) {  // a lane's value of register r of the sums
  return sum_bits[lane / 4 + 8 * (r / 2 % 2)][8 * (r / 4) + 2 * (lane % 4) + r % 2];
}
inline void read_sums(Warp& w, const s64* slots, int count) {
  for (int r = 0; r < count; r++)
    for (int lane = 0; lane < 32; lane++) sum_at(lane, r) = get<u32>(w.slot(slots[r]), lane);
}
inline void write_sums(Warp& w, const s64* slots, int count) {
  for (int r = 0; r < count; r++)
    for (int lane = 0; lane < 32; lane++) put(w.slot(slots[r]), lane, sum_at(lane, r));
}

// mma.m16n8: [type, k, 4 registers of the result, A's, B's, 4 of the sums].
inline void mma(Step& s) {
  int count_b = s[1] * size_of(s[0]) / 16, count_a = 2 * count_b;
  for (int r = 0; r < count_a; r++) read_a(s[0], s.slot(6 + r), r);
  for (int r = 0; r < count_b; r++) read_b(s[0], s.slot(6 + count_a + r), r);
  read_sums(s.w, &s.i.operands[6 + count_a + count_b], 4);
  multiply_tiles(s[0], s[1], 8);
  write_sums(s.w, &s.i.operands[2], 4);
}

// wgmma: [type, n, k, whether A's rows are contiguous (not its depth), the same for B's columns,
// whether A is in registers, whether to add, descriptor of A or its 4 registers, of B, sums ...].
enum { TYPE, N_SIZE, K_SIZE, ROWS_A, ROWS_B, IN_REGISTERS, ADDS, A };
const int B = A + 4, SUMS = B + 1;

// Rows of `span` bytes have their 16-byte pieces permuted, so that columns are in different banks.
inline u32 swizzled(u32 address, int span) {
  return span ? address ^ (address >> 3 & (span - 16)) : address;
}
// An operand in shared memory: rows of A, or columns of B, of this depth.
struct Operand {
  u64 descriptor;
  s64 type;
  int first_row, rows, depth;
  bool rows_lie_together;

  u32 address(int row, int k) const {
    static const int spans[] = {0, 128, 64, 32};
    u32 start = (descriptor & 0x3fff) << 4, offset;
    u32 leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
    int span = spans[descriptor >> 62], size = size_of(type), piece = 16 / size, line = span / size;
    if (!rows_lie_together)
      offset = row / 8 * stride + (span ? row % 8 * span + k * size
                                        : row % 8 * 16 + k / piece * leading + k % piece * size);
    else if (span)
      offset = row % line * size + row / line * leading + k % 8 * span + k / 8 * stride;
    else
      offset = row % piece * size + row / piece * stride + k % 8 * 16 + k / 8 * leading;
    return swizzled(start + offset, span);
  }
  // Pieces of 16 bytes with contiguous elements: f(row from the first, k, address).
  template <class F> void pieces(F f) const {
    int piece = 16 / size_of(type), k_step = rows_lie_together ? 1 : piece;
    for (int row = 0; row < rows; row += rows_lie_together ? piece : 1)
      for (int k = 0; k < depth; k += k_step) f(row, k, address(first_row + row, k));
  }
  void check(Step& s, bool notes) const {
    if (descriptor >> 49 & 7) fail("a descriptor with a base offset");
    int agent = s.m.product_agent(s.w);
    pieces([&](int, int, u32 a) {
      inside(s.m, a, 16);
      if (notes) note_read(s.m, s.w, a, 16, agent, s.w.products.committed + 1, true);
    });
  }
  void read(Machine& m, f32* to, int row_stride, int k_stride) const {
    int size = size_of(type), count = 16 / size, step = rows_lie_together ? row_stride : k_stride;
    pieces([&](int row, int k, u32 a) {
      f32* at = to + row * row_stride + k * k_stride;
      u32 words[4];
      memcpy(words, m.bytes(a), 16);
      for (int n = 0; n < count; n++)
        at[n * step] = number(type, words[n * size / 4] >> (n * size % 4 * 8));
    });
  }
};
inline Operand operand_a(const Warp& w, const std::vector<s64>& o, u64 descriptor) {
  return {descriptor, o[TYPE], 16 * (w.id % 4), 16, int(o[K_SIZE]), bool(o[ROWS_A])};
}
inline Operand operand_b(const std::vector<s64>& o, u64 descriptor) {
  return {descriptor, o[TYPE], 0, int(o[N_SIZE]), int(o[K_SIZE]), bool(o[ROWS_B])};
}

inline void mark_busy(Warp& w) {
  std::fill(w.busy.begin(), w.busy.end(), 0);
  w.any_busy = false;
  w.products.all([&](Product& product) {
    const auto& o = product.instruction->operands;
    w.any_busy |= !product.done;
    for (size_t n = SUMS; n < o.size() && !product.done; n++) w.busy[o[n]] = 1;
  });
  w.any_busy |= !w.tensor_loads.empty();
  for (TensorLoad& load : w.tensor_loads)
    load.registers([&](s64 slot, const u32*) { w.busy[slot] = 1; });
}

// The start of a wgmma: its reads are recorded, and its sums are busy until a wait.
inline void wgmma(Step& s) {
  if (!s.w.met) {  // its group meets here, which Triton assumes and the ISA doesn't promise
    s.w.state = AT_PRODUCT;
    s.w.again = true;
    return;
  }
  s.w.met = false;
  bool in_registers = s[IN_REGISTERS];
  Product product{&s.i, in_registers ? 0 : get<u64>(s.slot(A), 0), get<u64>(s.slot(B), 0),
                  s.slot(ADDS)[0] != 0, false, {}};
  for (int r = 0; r < 4 && in_registers; r++) memcpy(product.registers[r], s.slot(A + r), 128);
  Operand a = operand_a(s.w, s.i.operands, product.a), b = operand_b(s.i.operands, product.b);
  b.check(s, s.w.id % 4 == 0);
  if (!in_registers) a.check(s, true);
  s.w.products.open.push_back(product);
  mark_busy(s.w);
}
inline void multiply(Machine& m, Warp& w, Product& product) {
  if (product.done) return;
  product.done = true;
  const auto& o = product.instruction->operands;
  for (int r = 0; r < 4 && o[IN_REGISTERS]; r++) read_a(o[TYPE], product.registers[r], r);
  if (!o[IN_REGISTERS]) operand_a(w, o, product.a).read(m, tile_a[0], 32, 1);
  operand_b(o, product.b).read(m, tile_b[0], 1, 256);
  memset(sums, 0, sizeof sums);
  if (product.adds) read_sums(w, &o[SUMS], o[N_SIZE] / 2);
  multiply_tiles(o[TYPE], o[K_SIZE], o[N_SIZE]);
  write_sums(w, &o[SUMS], o[N_SIZE] / 2);
}
// The four warps of a group have waited.
inline void finish_products(Machine& m, Warp& w) {
  u32 over = w.products.wait(w.keep, [&](Product& product) { multiply(m, w, product); });
  u32& seen = w.clock[m.product_agent(w)];
  seen = std::max(seen, over);
  mark_busy(w);
}
inline void land_tensor_loads(Warp& w) {
  for (TensorLoad& load : w.tensor_loads)
    load.registers([&](s64 slot, const u32* data) { memcpy(w.slot(slot), data, 128); });
  w.tensor_loads.clear();
  mark_busy(w);
}
// An access to the sums of a running wgmma, or to registers that a tcgen05.ld will write: report it,
// and finish them at once.  (No GPU has both.)
inline void check_busy(Machine& m, Warp& w, const Instruction& i) {
  auto busy = [&](s64 slot) { return w.busy[slot]; };
  if (!std::any_of(i.registers.begin(), i.registers.end(), busy)) return;
  m.find(w.tensor_loads.empty() ? EARLY_REGISTER : EARLY_LOAD, m.pc, -1, 0, w);
  w.products.all([&](Product& product) { multiply(m, w, product); });
  land_tensor_loads(w);
}

inline Table products([] {
  together("mma", mma);
  together("wgmma.mma_async", wgmma);
  together("wgmma.fence", [](Step&) {});
  together("wgmma.commit_group", [](Step& s) { s.w.products.commit(); });
  together("wgmma.wait_group", [](Step& s) {
    s.w.keep = s[0];
    s.w.state = AT_PRODUCT_WAIT;
  });
});

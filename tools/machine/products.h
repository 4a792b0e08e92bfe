// Tensor cores: mma, and wgmma, which reads its operands no earlier than somebody waits for it.
// Products are exact; sums are rounded to float32 after each, in the order of k.
#pragma once
#include "memory.h"

enum Type { F16, BF16, TF32 };
inline int size_of(Type type) { return type == TF32 ? 4 : 2; }
inline f32 number(Type type, u32 bits) {
  if (type == TF32) return tf32(bits);
  return type == BF16 ? f32(std::bit_cast<bf16>(u16(bits))) : f32(std::bit_cast<f16>(u16(bits)));
}

// A warp's 16 rows of A [16, k], B [k, n], and sums [16, n].
struct Tile {
  f32 a[16][16], b[16][256], sums[16][256];

  void multiply(int k_size, int n_size) {
    for (int row = 0; row < 16; row++)
      for (int k = 0; k < k_size; k++)
        for (int n = 0; n < n_size; n++) sums[row][n] += a[row][k] * b[k][n];
  }
  // Register `r` of A's four: f(row, k, which half) for what a lane holds in it.
  void read_a(Type type, const u32* slot, int r) {
    for (int lane = 0; lane < 32; lane++) {
      int row = lane / 4 + 8 * (r & 1), k = lane % 4;
      if (type == TF32) {
        a[row][k + 4 * (r >> 1)] = tf32(slot[lane]);
        continue;
      }
      for (int half = 0; half < 2; half++)
        a[row][2 * k + 8 * (r >> 1) + half] = number(type, slot[lane] >> (16 * half));
    }
  }
  void read_b(Type type, const u32* slot, int r) {
    for (int lane = 0; lane < 32; lane++) {
      int n = lane / 4, k = lane % 4;
      if (type == TF32) {
        b[k + 4 * r][n] = tf32(slot[lane]);
        continue;
      }
      for (int half = 0; half < 2; half++)
        b[2 * k + 8 * r + half][n] = number(type, slot[lane] >> (16 * half));
    }
  }
  // The sum that a lane holds in register `r`.
  f32& sum(int lane, int r) {
    return sums[lane / 4 + 8 * (r >> 1 & 1)][8 * (r >> 2) + 2 * (lane % 4) + (r & 1)];
  }
  void read_sum(const u32* slot, int r) {
    for (int lane = 0; lane < 32; lane++) sum(lane, r) = get<f32>(slot, lane);
  }
  void write_sum(u32* slot, int r) {
    for (int lane = 0; lane < 32; lane++) put(slot, lane, sum(lane, r));
  }
};
inline Tile tile;

// mma.m16n8: a = [type, k, 4 registers of the result, A's, B's, 4 of the sums].
inline void mma(Machine&, Warp& w, const Instruction& i, u32) {
  Type type = Type(i.a[0]);
  int k_size = i.a[1], count_b = k_size * size_of(type) / 16, count_a = 2 * count_b;
  const s64 *to = &i.a[2], *a = to + 4, *b = a + count_a, *sums = b + count_b;
  for (int r = 0; r < count_a; r++) tile.read_a(type, w.slot(a[r]), r);
  for (int r = 0; r < count_b; r++) tile.read_b(type, w.slot(b[r]), r);
  for (int r = 0; r < 4; r++) tile.read_sum(w.slot(sums[r]), r);
  tile.multiply(k_size, 8);
  for (int r = 0; r < 4; r++) tile.write_sum(w.slot(to[r]), r);
}

// wgmma: a = [type, n, k, -1 where A is negated, B, whether A's rows lie side by side and not its
// depth, B's columns, whether A is in registers, whether to add, descriptor of A or its 4
// registers, descriptor of B, n / 2 registers of sums].
enum { N_SIZE = 1, K_SIZE, NEGATE_A, NEGATE_B, MAJOR_A, MAJOR_B, IN_REGISTERS, ADDS, A };
const int B = A + 4, SUMS = B + 1;

// An operand in shared memory: `rows` (A's rows, B's columns) of `depth` elements.
struct Operand {
  u64 descriptor;
  int first_row, rows, depth, size;
  bool rows_lie_together;

  u32 address(int row, int k) const {
    u32 start = (descriptor & 0x3fff) << 4, o;
    u32 leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
    static const int spans[] = {0, 128, 64, 32};
    int span = spans[descriptor >> 62], piece = 16 / size;
    if (!rows_lie_together)
      o = row / 8 * stride + (span ? row % 8 * span + k * size
                                   : row % 8 * 16 + k / piece * leading + k % piece * size);
    else if (span)
      o = row % (span / size) * size + row / (span / size) * leading + k % 8 * span + k / 8 * stride;
    else
      o = row % piece * size + row / piece * stride + k % 8 * 16 + k / 8 * leading;
    return swizzled(start + o, span);
  }
  // Pieces of 16 bytes, in which elements lie side by side: f(row, k, address).
  template <class F> void pieces(F f) const {
    int row_step = rows_lie_together ? 16 / size : 1, k_step = rows_lie_together ? 1 : 16 / size;
    for (int row = first_row; row < first_row + rows; row += row_step)
      for (int k = 0; k < depth; k += k_step) f(row, k, address(row, k));
  }
  // Into a matrix with these strides.
  void read(Machine& m, Type type, f32 sign, f32* to, int row_stride, int k_stride) const {
    int step = rows_lie_together ? row_stride : k_stride;
    pieces([&](int row, int k, u32 address) {
      f32* at = to + (row - first_row) * row_stride + k * k_stride;
      for (int n = 0; n < 16 / size; n++) {
        u32 bits = 0;
        memcpy(&bits, m.bytes(address) + n * size, size);
        at[n * step] = sign * number(type, bits);
      }
    });
  }
};
inline Operand operand_a(const Warp& w, const Instruction& i, u64 descriptor) {
  int size = size_of(Type(i.a[0]));
  return {descriptor, 16 * (w.id % 4), 16, int(i.a[K_SIZE]), size, bool(i.a[MAJOR_A])};
}
inline Operand operand_b(const Instruction& i, u64 descriptor) {
  int size = size_of(Type(i.a[0]));
  return {descriptor, 0, int(i.a[N_SIZE]), int(i.a[K_SIZE]), size, bool(i.a[MAJOR_B])};
}

inline void note_operand(Machine& m, Warp& w, const Operand& operand, bool notes) {
  if (operand.descriptor >> 49 & 7) fail("a descriptor with a base offset");
  operand.pieces([&](int, int, u32 address) {
    m.inside(address, 16);
    if (notes)
      m.note_read(w, address, 16, m.pc, m.product_agent(w), w.products.committed + 1, true);
  });
}

// It begins: its reads are noted, and its sums are busy until somebody waits.
inline void wgmma(Machine& m, Warp& w, const Instruction& i, u32) {
  if (!w.met) {  // its group comes together here, as Triton counts on; the ISA doesn't say so
    w.state = AT_PRODUCT;
    w.again = true;
    return;
  }
  w.met = false;
  bool in_registers = i.a[IN_REGISTERS];
  Product product{&i, in_registers ? 0 : w.wide(i.a[A])[0], w.wide(i.a[B])[0],
                  w.slot(i.a[ADDS])[0] != 0, false, {}};
  for (int r = 0; r < 4 && in_registers; r++) memcpy(product.registers[r], w.slot(i.a[A + r]), 128);
  note_operand(m, w, operand_b(i, product.b), w.id % 4 == 0);
  if (!in_registers) note_operand(m, w, operand_a(w, i, product.a), true);
  w.products.open.push_back(product);
  m.mark_busy(w);
}

inline void Machine::multiply(Warp& w, Product& product) {
  if (product.done) return;
  product.done = true;
  const Instruction& i = *product.instruction;
  Type type = Type(i.a[0]);
  int n_size = i.a[N_SIZE], k_size = i.a[K_SIZE];
  for (int r = 0; r < 4 && i.a[IN_REGISTERS]; r++) tile.read_a(type, product.registers[r], r);
  if (!i.a[IN_REGISTERS])
    operand_a(w, i, product.a).read(*this, type, i.a[NEGATE_A], tile.a[0], 16, 1);
  operand_b(i, product.b).read(*this, type, i.a[NEGATE_B], tile.b[0], 1, 256);
  if (!product.adds) memset(tile.sums, 0, sizeof tile.sums);
  for (int r = 0; r < n_size / 2 && product.adds; r++) tile.read_sum(w.slot(i.a[SUMS + r]), r);
  tile.multiply(k_size, n_size);
  for (int r = 0; r < n_size / 2; r++) tile.write_sum(w.slot(i.a[SUMS + r]), r);
}

inline void Machine::mark_busy(Warp& w) {
  std::fill(w.busy.begin(), w.busy.end(), 0);
  w.any_busy = false;
  w.products.each([&](Product& product) {
    if (product.done) return;
    w.any_busy = true;
    const auto& a = product.instruction->a;
    for (size_t n = SUMS; n < a.size(); n++) w.busy[a[n]] = 1;
  });
}

// Somebody reads or writes sums of a running wgmma: it is said, and they are computed at once.
inline void Machine::check_busy(Warp& w, const Instruction& i) {
  auto busy = [&](s64 slot) { return w.busy[slot]; };
  if (!std::any_of(i.registers.begin(), i.registers.end(), busy)) return;
  find(EARLY_REGISTER, pc, -1, 0, w);
  w.products.each([&](Product& product) { multiply(w, product); });
  mark_busy(w);
}

inline Register products([] {
  together("mma", mma);
  together("wgmma.mma_async", wgmma);
  together("wgmma.fence", [](Machine&, Warp&, const Instruction&, u32) {});
  together("wgmma.commit_group", [](Machine&, Warp& w, const Instruction&, u32) {
    w.products.commit();
  });
  together("wgmma.wait_group", [](Machine&, Warp& w, const Instruction& i, u32) {
    w.keep = i.a[0];
    w.state = AT_PRODUCT_WAIT;
  });
});

// The emulator: a program, and one CTA at a time that runs it, warp by warp.
#pragma once
#include <algorithm>
#include <array>
#include <deque>
#include <map>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "numbers.h"

const u64 PARAMETERS = 0x5000000000000000;  // the address space of cvta.param
const u32 SHARED_START = 1024;              // lower addresses belong to CUDA

const u32 UNWRITTEN = 0xfff7dead;           // the initial value of registers and tensor memory: NaN

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

struct Step;
using Run = void (*)(Step&);
struct Operation {
  Run run;
  bool together;  // the lanes of a warp meet here
};
inline std::unordered_map<std::string, Operation>& operations() {  // by the names of ptx.py
  static std::unordered_map<std::string, Operation> all;
  return all;
}
inline void normal(const std::string& name, Run run) { operations()[name] = {run, false}; }
inline void together(const std::string& name, Run run) { operations()[name] = {run, true}; }
struct Table {  // filled when the library is loaded
  template <class F> Table(F fill) { fill(); }
};

struct Instruction {
  Operation operation;
  s64 guard;  // a predicate's slot, or -1
  bool negated;
  int pc;
  std::vector<s64> operands;   // slots and numbers, in the order of ptx.py's table
  std::vector<s64> registers;  // accessed registers, without the sums of a wgmma
};

// The operations that a warp has started, in the groups that it commits and waits for.
template <class T> struct Groups {
  std::vector<T> open;
  std::deque<std::vector<T>> running;
  u32 committed = 0;

  void commit() {
    running.push_back(std::move(open));
    open.clear();
    committed++;
  }
  template <class F> u32 wait(size_t keep, F finish) {  // returns the number of finished groups
    for (; running.size() > keep; running.pop_front())
      for (T& each : running.front()) finish(each);
    return committed - running.size();
  }
  bool none() const { return open.empty() && running.empty(); }
  template <class F> void all(F f) {
    for (auto& group : running) std::for_each(group.begin(), group.end(), f);
    std::for_each(open.begin(), open.end(), f);
  }
};

struct Copy {  // a cp.async, and the bytes that it read
  u32 to, size;
  std::array<u8, 16> data;
  int pc;
};
struct TensorMap {  // packed by compiled.py; dimensions from the innermost on
  u64 magic, base;
  u8 rank, size, swizzle, unused;
  u32 shape[5];
  u64 strides[4];  // in bytes
  u16 box[5];
};
struct BulkStore {
  TensorMap map;
  s32 corner[5];
  u32 from;
  int pc;
};
struct BulkLoad {
  u32 barrier, to;
  std::vector<u8> data;
  int pc;
};
struct Product {  // a wgmma before its wait
  const Instruction* instruction;
  u64 a, b;  // descriptors
  bool adds, done;
  u32 registers[4][32];  // A, if it isn't in shared memory
};

struct TensorLoad {  // a tcgen05.ld before its wait
  static const int REGISTERS = 5;  // the position of the first among its operands, as in tcgen05.st
  const Instruction* instruction;
  std::vector<u32> data;  // [registers, lanes]

  template <class F> void registers(F f) const {  // f(slot, its future value)
    for (size_t n = REGISTERS; n < instruction->operands.size(); n++)
      f(instruction->operands[n], &data[32 * (n - REGISTERS)]);
  }
};
struct TensorProduct {  // a tcgen05.mma that hasn't run
  s64 type;
  int rows, columns, depth;
  bool rows_together_a, rows_together_b;  // rows are contiguous, not the depth
  bool adds, a_in_tensor_memory;
  u32 lane, column, column_a;  // in tensor memory: of its sums, and of A
  u64 a, b;                    // descriptors
};

// A vector clock: for each agent, the number of its synchronizations that this agent is ordered
// after.  Agents: warps, then the wgmma of each warp group, each warp's bulk stores, all tcgen05.mma,
// and each mbarrier's bulk loads.
using Clock = std::vector<u32>;
inline void join(Clock& into, const Clock& from) {
  for (size_t i = 0; i < into.size(); i++) into[i] = std::max(into[i], from[i]);
}

enum State { RUNS, AT_BARRIER, AT_MBARRIER, AT_PRODUCT, AT_PRODUCT_WAIT, DONE };
struct Warp {
  int id;
  State state = RUNS;
  bool again = false;  // the waiting instruction runs again
  bool met = false;    // its warp group is at the same wgmma
  bool uniform = true;  // all lanes are at `pc`; otherwise each has its own
  int pc = 0, pcs[32];
  u32 alive, parked = 0, taken = 0;
  std::vector<u32> registers;
  Clock clock, fenced;  // fenced: the part that the async proxy also sees
  u64 barrier = 0, barrier_threads = 0, parity = 0, keep = 0;  // the conditions of its wait
  Groups<Copy> copies;
  Groups<Product> products;
  Groups<BulkStore> stores;
  std::vector<TensorLoad> tensor_loads;
  std::vector<u32> reads_tensor, writes_tensor;  // cells of its shadow, until it waits
  std::vector<u8> busy;  // registers that a running wgmma or tcgen05.ld writes
  bool any_busy = false;

  u32* slot(s64 n) { return registers.data() + n * 32; }
  u64 raw(s64 n, s64 bits, int lane) {
    return bits == 64 ? get<u64>(slot(n), lane) : slot(n)[lane];
  }
};

struct Barrier {  // an mbarrier
  bool valid = false, phase = false;
  s64 count = 0, pending = 0, bytes = 0;
  int agent = -1, made_by = 0;
  u32 made_at = 0;
  Clock clock, fenced;
  void arrive() {
    if (--pending < 0) fail("too many arrivals");
    settle();
  }
  void settle() {
    if (pending || bytes) return;
    phase = !phase;
    pending = count;
  }
};

struct Storage {  // of tensors: for each byte, whether it may be accessed, its last writer and reader
  u64 start, end;
  u8* allowed;
  u64 *writers, *readers;
};
struct Written {  // a cell of a memory: its last write
  u32 clock = 0;
  int pc = -1, agent = -1;
  bool in_flight = false, generic = false;
  u64 order = 0;  // of tcgen05.mma: operations with equal order run one after the other
};
struct Shadow {  // the race detector's state of a memory, by cells.  Agents before `readers` read
  size_t readers = 0;
  std::vector<Written> written;
  std::vector<u32> read_clock;
  std::vector<int> read_pc;

  void start(size_t cells, int of_readers) {
    readers = of_readers;
    written.assign(cells, {});
    read_clock.assign(cells * readers, 0);
    read_pc.assign(cells * readers, 0);
  }
};
struct TensorMemory {
  std::vector<u32> words;  // [lanes, columns]; empty before the first allocation
  std::vector<u8> taken;   // columns
  Shadow shadow;
  Groups<TensorProduct> products;
  std::deque<u32> arrivals;  // the mbarrier of each commit
  int issuer = -1;
  bool relinquished = false;
};

// In the order of memory.py's KINDS.
enum Kind {
  RAW, WAR, WAW, IN_FLIGHT, NO_FENCE, UNINITIALIZED, TWICE, GLOBAL_RACE, EARLY_REGISTER, EARLY_LOAD
};
struct Finding {
  s64 kind, pc, other, address, cta, warp, count;
};
struct Launch {  // the same fields as in memory.py
  s64 grid[3], threads, shared, granule, check, limit;
  const u8* parameters;
  const s64 *ctas, *warp_order;  // in their order of execution
  s64 parameter_bytes, cta_count, storage_count;
  const u64 *starts, *ends;  // of storages
  u8* const* allowed;
  u64 *const *writers, *const *readers;
};

struct Machine {
  std::vector<Instruction> program;
  s64 slots = 0;
  std::vector<std::array<s64, 3>> constants;  // slot, value, whether it has 64 bits
  std::vector<std::array<s64, 2>> specials;   // slot, which special register
  Launch launch{};
  std::vector<Storage> storages;
  std::map<std::array<s64, 3>, Finding> findings;
  std::string error;
  s64 steps = 0, cta = 0;
  int pc = -1, warp_count = 0, group_count = 0;
  std::vector<Warp> warps;
  std::vector<u8> shared;
  std::map<u32, Barrier> barriers;
  std::deque<BulkLoad> loads;
  TensorMemory tensor_memory;
  int readers = 0, agents = 0, barriers_made = 0;
  Shadow shadow;  // of shared memory, by granules

  u8* bytes(u32 address) { return &shared[address - SHARED_START]; }
  int product_agent(const Warp& w) const { return warp_count + w.id / 4; }
  int store_agent(const Warp& w) const { return warp_count + group_count + w.id; }
  int tensor_agent() const { return 2 * warp_count + group_count; }
  void find(Kind kind, int at, int other, s64 address, const Warp& w) {
    Finding first{kind, at, other, address, cta, w.id, 0};
    findings.try_emplace({kind, at, other}, first).first->second.count++;
  }
};

// The context of an operation: a warp at an instruction, its active lanes, and its operands.
struct Step {
  Machine& m;
  Warp& w;
  const Instruction& i;
  u32 active;

  size_t count() const { return i.operands.size(); }
  s64 operator[](int n) const { return i.operands[n]; }
  u32* slot(int n) { return w.slot(i.operands[n]); }
  // An address is three operands: slot, bits of it, offset.
  u64 address(int n, int lane) { return w.raw((*this)[n], (*this)[n + 1], lane) + (*this)[n + 2]; }
  int only_lane() const {
    if (active & (active - 1)) fail("more than one thread is here");
    return std::countr_zero(active);
  }
  // Compute all lanes, then store the active ones, so that such loops become vector instructions.
  template <class T, class F> void set(int n, F value) {
    T results[32];
    u32* to = slot(n);
    for (int lane = 0; lane < 32; lane++) results[lane] = value(lane);
    if (active == ALL_LANES)
      for (int lane = 0; lane < 32; lane++) put<T>(to, lane, results[lane]);
    else
      each(active, [&](int lane) { put<T>(to, lane, results[lane]); });
  }
  template <class F> void set_bits(int n, s64 bits, F value) {
    if (bits == 64) set<u64>(n, value);
    else if (bits == 32) set<u32>(n, value);
    else set<u16>(n, value);
  }
};

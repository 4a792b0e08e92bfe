// The machine: a program, and one CTA at a time that runs it, warp by warp.
#pragma once
#include <algorithm>
#include <array>
#include <deque>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "numbers.h"

// Where the windows of parameters and of shared memory lie in the generic address space.
const u64 PARAMETERS = 0x5000000000000000, SHARED = 0x6000000000000000;
const u32 SHARED_START = 1024;  // below it are CUDA's own bytes

struct Machine;
struct Warp;
struct Instruction;
using Function = void (*)(Machine&, Warp&, const Instruction&, u32 active);

struct Operation {
  Function run;
  bool together;  // the lanes of a warp meet here
};
// By the names that ptx.py gives them.
std::unordered_map<std::string, Operation>& operations();

struct Register {  // of an operation, when the library is loaded
  template <class F> Register(F fill) { fill(); }
};

inline void normal(const std::string& name, Function run) { operations()[name] = {run, false}; }
inline void together(const std::string& name, Function run) { operations()[name] = {run, true}; }

struct Instruction {
  Operation operation;
  s64 guard;  // a predicate's slot, or -1
  bool negated;
  int pc;
  std::vector<s64> a;          // its operands, slots and numbers, in the order of ptx.py's table
  std::vector<s64> registers;  // what it touches besides the sums of a wgmma
};

struct Fault {
  std::string what;
};
[[noreturn]] inline void fail(const std::string& what) { throw Fault{what}; }

// What a warp has begun, in the groups that it commits and waits for.
template <class T> struct Groups {
  std::vector<T> open;
  std::deque<std::vector<T>> running;
  u32 committed = 0;

  void commit() {
    running.push_back(std::move(open));
    open.clear();
    committed++;
  }
  template <class F> void wait(size_t keep, F finish) {
    for (; running.size() > keep; running.pop_front())
      for (T& each : running.front()) finish(each);
  }
  template <class F> void each(F f) {
    for (auto& group : running)
      for (T& each : group) f(each);
    for (T& each : open) f(each);
  }
  u32 finished() const { return committed - running.size(); }
};

// cp.async: what it read, until it lands.
struct Copy {
  u32 to, size;
  std::array<u8, 16> data;
  int pc;
};
// A tensor map as memory.py packs it; dimensions from the innermost on.
struct TensorMap {
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
struct Product {  // a wgmma that nobody has waited for
  const Instruction* instruction;
  u64 a, b;  // descriptors
  bool adds, done;
  u32 registers[4][32];  // A, where it isn't in shared memory
};

// How often each agent had synchronised when this one heard of it.  Agents: warps, then the
// wgmma of each warp group, each warp's bulk stores, and each mbarrier's bulk loads.
using Clock = std::vector<u32>;
inline void join(Clock& into, const Clock& from) {
  for (size_t i = 0; i < into.size(); i++) into[i] = std::max(into[i], from[i]);
}

enum State { RUNS, AT_BARRIER, AT_MBARRIER, AT_PRODUCT, AT_PRODUCT_WAIT, DONE };

struct Warp {
  int id;
  State state = RUNS;
  bool again = false;  // the instruction that it waits in runs once more
  u32 alive, parked = 0, taken = 0;
  bool uniform = true;  // all lanes are at `pc`, else each at its own
  int pc = 0, pcs[32];
  std::vector<u32> registers;
  Clock clock, fenced;  // fenced: of what the async proxy sees as well
  u64 barrier = 0, barrier_threads = 0, parity = 0, keep = 0;  // what it waits for
  bool met = false;  // its warp group is at the same wgmma
  Groups<Copy> copies;
  Groups<Product> products;
  Groups<BulkStore> stores;
  std::vector<u8> busy;  // registers that a wgmma adds to
  bool any_busy = false;

  u32* slot(s64 i) { return registers.data() + i * 32; }
  u64* wide(s64 i) { return reinterpret_cast<u64*>(slot(i)); }
};

struct Barrier {  // an mbarrier
  bool valid = false;
  s64 count = 0, pending = 0, bytes = 0;
  bool phase = false;
  int agent = -1, made_by = 0;
  u32 made_at = 0;
  Clock clock, fenced;
  void settle() {
    if (pending || bytes) return;
    phase = !phase;
    pending = count;
  }
};

// A tensor's storage: which bytes may be touched, and who wrote and read each last.
struct Storage {
  u64 start, end;
  u8* allowed;
  u64 *writers, *readers;
};
const u64 SEVERAL = ~0ull;  // readers of several CTAs

struct Written {  // of a granule of shared memory: its last write
  u32 clock = 0;
  int pc = -1, agent = -1;
  bool in_flight = false, generic = false;
};

enum Kind {
  RAW,
  WAR,
  WAW,
  IN_FLIGHT,
  NO_PROXY_FENCE,
  UNINITIALISED,
  STORED_TWICE,
  GLOBAL_RACE,
  EARLY_REGISTER
};
struct Finding {
  s64 kind, pc, other, address, cta, warp, count;
};

// What a launch is; memory.py has the same.
struct Launch {
  s64 grid[3], threads, shared, granule, check, limit;
  const u8* parameters;
  const s64 *ctas, *warp_order;  // in the order in which they run
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
  // The shadow of shared memory, by granules.  Agents before `readers` read.
  int readers = 0, agents = 0, barriers_made = 0;
  std::vector<Written> written;
  std::vector<u32> read_clock;
  std::vector<int> read_pc;

  void find(Kind kind, int at, int other, s64 address, const Warp& w);
  // memory.h
  u8* bytes(u32 address) { return &shared[address - SHARED_START]; }
  void inside(u64 address, u64 size);
  void note_read(const Warp& w, u32 address, u32 size, int at, int agent, u32 clock, bool async);
  void note_read(const Warp& w, u32 address, u32 size);
  void note_write(const Warp& w, u32 address, u32 size, bool in_flight, const u8* data = nullptr);
  void land(u32 address, const u8* data, u32 size, int at, int agent, u32 clock, bool generic);
  Storage* storage_of(u64 address, u32 size);
  void global(const Warp& w, u64 address, u32 size, bool write, int at);
  u64 tag(const Warp& w) const;
  bool before(u64 tag, const Warp& w) const;
  // products.h, copies.h
  int product_agent(const Warp& w) const { return warp_count + w.id / 4; }
  int store_agent(const Warp& w) const { return warp_count + group_count + w.id; }
  void multiply(Warp& w, Product& product);
  void mark_busy(Warp& w);
  void finish_stores(Warp& w, size_t keep);
  bool land_loads(u32 barrier);
  // control.h
  void start_warp(Warp& w);
  void start_cta();
  void run_cta();
  bool run_warp(Warp& w);
  bool release();
  void meet(const std::vector<Warp*>& who);
  void check_busy(Warp& w, const Instruction& i);
};

// Lanes of a register of so many bits.
inline u64 raw(Warp& w, s64 slot, s64 bits, int lane) {
  return bits == 64 ? w.wide(slot)[lane] : w.slot(slot)[lane];
}
inline void put_raw(Warp& w, s64 slot, s64 bits, u32 active, const u64* values) {
  auto value = [&](int lane) { return values[lane]; };
  if (bits == 64)
    keep_active<u64>(w.slot(slot), active, value);
  else if (bits == 32)
    keep_active<u32>(w.slot(slot), active, value);
  else
    keep_active<u16>(w.slot(slot), active, value);
}

// Rows of `span` bytes, whose pieces of 16 are mixed so that columns lie in different banks.
inline u32 swizzled(u32 address, int span) {
  return span ? address ^ (address >> 3 & (span - 16)) : address;
}

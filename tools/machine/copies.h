// Asynchronous copies (cp.async, and TMA's tensor copies), and mbarriers.  A copy arrives when a
// wait for it ends, and not before.
#pragma once
#include "products.h"

// cp.async: [bytes, slot of the bytes to read (the rest is zero) or -1, to, from].
inline void cp_async(Step& s) {
  each(s.active, [&](int lane) {
    u32 size = s[0], read = s[1] < 0 ? size : s.slot(1)[lane];
    u64 to = s.address(2, lane), from = s.address(5, lane);
    if (to % size || (read && from % size)) fail("misaligned copy");
    if (read > size) fail("a copy reads more than it writes");
    inside(s.m, to, size);
    Copy copy{u32(to), size, {}, s.m.pc};
    if (read) global(s.m, s.w, from, read, nullptr, s.m.pc);
    memcpy(copy.data.data(), (void*)from, read);
    begin_copy(s.m, s.w, to, size);
    s.w.copies.open.push_back(copy);
  });
}
inline void wait_copies(Step& s) {
  s.w.copies.wait(s[0], [&](Copy& copy) {
    u32 now = s.w.clock[s.w.id];
    land(s.m, copy.to, copy.data.data(), copy.size, copy.pc, s.w.id, now, true);
  });
}

inline Barrier& barrier_at(Step& s, u32 address) {
  Barrier& b = s.m.barriers[address];
  if (!b.valid) fail("no mbarrier there");
  bool ordered = b.made_by == s.w.id || s.w.clock[b.made_by] >= b.made_at;
  if (!ordered) s.m.find(RAW, s.m.pc, -1, address - SHARED_START, s.w);
  return b;
}
// [slot of the count of arrivals, address].
inline void make_barrier(Step& s) {
  u32 address = s.address(1, s.only_lane()), count = s.slot(0)[s.only_lane()];
  inside(s.m, address, 8);
  note_write(s.m, s.w, address, 8, false);
  int agent = s.m.barriers[address].agent;
  if (agent < 0) agent = s.m.readers + s.m.barriers_made++;
  if (agent >= s.m.agents) fail("too many mbarriers");
  Clock zero(s.m.agents, 0);
  u32 now = s.w.clock[s.w.id];
  s.m.barriers[address] = {true, false, count, count, 0, agent, s.w.id, now, zero, zero};
}
inline void end_barrier(Step& s) {
  u32 address = s.address(0, s.only_lane());
  if (!s.m.barriers[address].valid) fail("no mbarrier there");
  for (auto& load : s.m.loads)
    if (load.barrier == address) fail("an mbarrier goes while a copy is on its way");
  for (u32 barrier : s.m.tensor_memory.arrivals)
    if (barrier == address) fail("an mbarrier goes while a product is on its way");
  note_write(s.m, s.w, address, 8, false);
  s.m.barriers[address].valid = false;
}
// [slot of the bytes to expect or -1, address].
inline void arrive(Step& s) {
  each(s.active, [&](int lane) {
    Barrier& b = barrier_at(s, s.address(1, lane));
    if (s[0] >= 0) b.bytes += s.slot(0)[lane];
    join(b.clock, s.w.clock);
    join(b.fenced, s.w.fenced);
    b.arrive();
  });
  s.w.clock[s.w.id]++;
}
// [result, slot of the parity, address].  A warp stays at this instruction until the phase is over.
inline void wait_barrier(Step& s) {
  int lane = std::countr_zero(s.active);
  u32 address = s.address(2, lane), parity = s.slot(1)[lane] & 1;
  Barrier& b = barrier_at(s, address);
  if (b.phase == parity) {
    s.w.barrier = address;
    s.w.parity = parity;
    s.w.state = AT_MBARRIER;
    s.w.again = true;
    return;
  }
  join(s.w.clock, b.clock);
  join(s.w.fenced, b.fenced);
  s.set<u32>(0, [](int) { return 1; });
}

// TMA.  The tensor map must be a parameter; coordinates follow at `at`.
inline TensorMap tensor_map(Step& s, int lane, int at, s32* corner) {
  TensorMap map;
  u64 address = get<u64>(s.slot(0), lane), offset = address - PARAMETERS;
  if (address < PARAMETERS || s64(offset + sizeof map) > s.m.launch.parameter_bytes)
    fail("a tensor map that isn't a parameter");
  memcpy(&map, s.m.launch.parameters + offset, sizeof map);
  if (map.magic != 0x70a5c0de) fail("no tensor map is there");
  if (map.rank != s.count() - at) fail("the tensor map has another rank");
  for (int d = 0; d < map.rank; d++) corner[d] = s.slot(at + d)[lane];
  return map;
}
inline u32 box_bytes(const TensorMap& map) {
  u32 size = map.size;
  for (int d = 0; d < map.rank; d++) size *= map.box[d];
  return size;
}
// The elements of a box that are in the tensor: f(address in shared memory, in global memory).
template <class F> void elements(const TensorMap& map, const s32* corner, u32 start, F f) {
  for (u32 n = 0; n < box_bytes(map) / map.size; n++) {
    u64 rest = n, address = map.base;
    bool in_tensor = true;
    for (int d = 0; d < map.rank; d++, rest /= map.box[d - 1]) {
      s64 x = corner[d] + s64(rest % map.box[d]);
      in_tensor &= x >= 0 && x < s64(map.shape[d]);
      address += x * (d ? map.strides[d - 1] : map.size);
    }
    if (in_tensor) f(swizzled(start + n * map.size, map.swizzle), address);
  }
}
// [map, to, mbarrier, coordinates ...].
inline void bulk_load(Step& s) {
  int lane = s.only_lane();
  s32 corner[5];
  TensorMap map = tensor_map(s, lane, 7, corner);
  u32 to = s.address(1, lane), barrier = s.address(4, lane), size = box_bytes(map);
  barrier_at(s, barrier);
  inside(s.m, to, size);
  if (to % 128 || (map.swizzle && map.box[0] * map.size > map.swizzle)) fail("alignment or box");
  BulkLoad load{barrier, to, std::vector<u8>(size), s.m.pc};
  elements(map, corner, to, [&](u32 shared, u64 address) {
    global(s.m, s.w, address, map.size, nullptr, s.m.pc);
    memcpy(&load.data[shared - to], (void*)address, map.size);
  });
  begin_copy(s.m, s.w, to, size);
  s.m.loads.push_back(std::move(load));
}
// All copies that a barrier counts, in the order of their start.
inline bool land_loads(Machine& m, u32 address) {
  Barrier& b = m.barriers[address];
  return std::erase_if(m.loads, [&](BulkLoad& load) {
    if (load.barrier != address) return false;
    u32 size = load.data.size(), now = ++b.clock[b.agent];
    land(m, load.to, load.data.data(), size, load.pc, b.agent, now, false);
    b.bytes -= size;
    b.settle();
    return true;
  });
}
// [map, from, coordinates ...].  It reads when a wait for it ends.
inline void bulk_store(Step& s) {
  int lane = s.only_lane();
  BulkStore store{{}, {}, u32(s.address(1, lane)), s.m.pc};
  store.map = tensor_map(s, lane, 4, store.corner);
  u32 size = box_bytes(store.map);
  inside(s.m, store.from, size);
  note_read(s.m, s.w, store.from, size, s.m.store_agent(s.w), s.w.stores.committed + 1, true);
  s.w.stores.open.push_back(store);
}
inline void finish_stores(Machine& m, Warp& w, size_t keep) {
  u32 over = w.stores.wait(keep, [&](BulkStore& store) {
    elements(store.map, store.corner, store.from, [&](u32 shared, u64 address) {
      global(m, w, address, store.map.size, m.bytes(shared), store.pc);
      memcpy((void*)address, m.bytes(shared), store.map.size);
    });
  });
  u32& seen = w.clock[m.store_agent(w)];
  seen = std::max(seen, over);
}

inline Table copies([] {
  normal("cp.async", cp_async);
  normal("cp.async.commit_group", [](Step& s) { s.w.copies.commit(); });
  normal("cp.async.wait_group", wait_copies);
  normal("fence.proxy.async", [](Step& s) {
    join(s.w.fenced, s.w.clock);
    s.w.clock[s.w.id]++;
  });
  normal("mbarrier.init", make_barrier);
  normal("mbarrier.inval", end_barrier);
  normal("mbarrier.arrive", arrive);
  together("mbarrier.wait", wait_barrier);
  normal("bulk.load", bulk_load);
  normal("bulk.store", bulk_store);
  normal("bulk.commit_group", [](Step& s) { s.w.stores.commit(); });
  normal("bulk.wait_group", [](Step& s) { finish_stores(s.m, s.w, s[0]); });
});

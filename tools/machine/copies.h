// Copies that run by themselves (cp.async, and TMA's tensor copies), and mbarriers.  Their bytes
// are NaN until somebody who waits lets them land.
#pragma once
#include "memory.h"

inline void begin_copy(Machine& m, Warp& w, u32 to, u32 size) {
  m.note_write(w, to, size, true);
  memset(m.bytes(to), 0xff, size);
}

// cp.async: a = [bytes, slot of the bytes to read (the rest is zero) or -1, to, from].
inline void cp_async(Machine& m, Warp& w, const Instruction& i, int lane) {
  u32 size = i.a[0], read = i.a[1] < 0 ? size : w.slot(i.a[1])[lane];
  u64 to = address_of(w, i, 2, lane), from = address_of(w, i, 5, lane);
  if (to % size || (read && from % size)) fail("misaligned copy");
  if (read > size) fail("a copy reads more than it writes");
  m.inside(to, size);
  Copy copy{u32(to), size, {}, m.pc};
  if (read) {
    m.global(w, from, read, false, m.pc);
    memcpy(copy.data.data(), reinterpret_cast<void*>(from), read);
  }
  begin_copy(m, w, to, size);
  w.copies.open.push_back(copy);
}
inline void finish_copies(Machine& m, Warp& w, size_t keep) {
  w.copies.wait(keep, [&](Copy& copy) {
    m.land(copy.to, copy.data.data(), copy.size, copy.pc, w.id, w.clock[w.id], true);
  });
}

inline Barrier& barrier_at(Machine& m, Warp& w, u32 address) {
  Barrier& b = m.barriers[address];
  if (!b.valid) fail("no mbarrier there");
  if (b.made_by != w.id && w.clock[b.made_by] < b.made_at) m.find(RAW, m.pc, -1, address, w);
  return b;
}

// a = [threads, address].
inline void make_barrier(Machine& m, Warp& w, const Instruction& i, u32 active) {
  int lane = only_lane(active);
  u32 address = address_of(w, i, 1, lane), count = w.slot(i.a[0])[lane];
  m.inside(address, 8);
  m.note_write(w, address, 8, false);
  int agent = m.barriers[address].agent;
  if (agent < 0) agent = m.readers + m.barriers_made++;
  if (agent >= m.agents) fail("too many mbarriers");
  Clock zero(m.agents, 0);
  u32 now = w.clock[w.id];
  m.barriers[address] = {true, count, count, 0, false, agent, w.id, now, zero, zero};
}

inline void end_barrier(Machine& m, Warp& w, const Instruction& i, u32 active) {
  u32 address = address_of(w, i, 0, only_lane(active));
  if (!m.barriers[address].valid) fail("no mbarrier there");
  for (auto& load : m.loads)
    if (load.barrier == address) fail("an mbarrier goes while a copy is on its way");
  m.note_write(w, address, 8, false);
  m.barriers[address].valid = false;
}

// a = [slot of the bytes to expect or -1, slot of the count of arrivals or -1, address].
inline void arrive(Machine& m, Warp& w, const Instruction& i, u32 active) {
  active_lanes(active, [&](int lane) {
    Barrier& b = barrier_at(m, w, address_of(w, i, 2, lane));
    if (i.a[0] >= 0) b.bytes += w.slot(i.a[0])[lane];
    join(b.clock, w.clock);
    join(b.fenced, w.fenced);
    b.pending -= i.a[1] < 0 ? 1 : w.slot(i.a[1])[lane];
    if (b.pending < 0) fail("too many arrivals");
    b.settle();
  });
  w.clock[w.id]++;
}

// a = [result, slot of the parity, address].  A warp waits here until the phase is over.
inline void wait_barrier(Machine& m, Warp& w, const Instruction& i, u32 active) {
  int lane = std::countr_zero(active);
  u32 address = address_of(w, i, 2, lane), parity = w.slot(i.a[1])[lane] & 1;
  Barrier& b = barrier_at(m, w, address);
  if (b.phase == parity) {
    w.barrier = address;
    w.parity = parity;
    w.state = AT_MBARRIER;
    w.again = true;
    return;
  }
  join(w.clock, b.clock);
  join(w.fenced, b.fenced);
  keep_active<u32>(w.slot(i.a[0]), active, [](int) { return 1; });
}

// TMA.  The tensor map, which must be a parameter.
inline TensorMap tensor_map(Machine& m, u64 address, s64 rank) {
  TensorMap map;
  u64 offset = address - PARAMETERS;
  if (address < PARAMETERS || s64(offset + sizeof map) > m.launch.parameter_bytes)
    fail("a tensor map that isn't a parameter");
  memcpy(&map, m.launch.parameters + offset, sizeof map);
  if (map.magic != 0x70a5c0de) fail("no tensor map is there");
  if (map.rank != rank) fail("the tensor map has another rank");
  return map;
}
inline u64 box_bytes(const TensorMap& map) {
  u64 size = map.size;
  for (int d = 0; d < map.rank; d++) size *= map.box[d];
  return size;
}
// The elements of a box: f(address in shared memory, in global memory), if it is in the tensor.
template <class F> void elements(const TensorMap& map, const s32* corner, u32 start, F f) {
  u64 count = box_bytes(map) / map.size;
  for (u64 n = 0; n < count; n++) {
    u64 rest = n, address = map.base;
    bool inside = true;
    for (int d = 0; d < map.rank; d++) {
      s64 x = corner[d] + s64(rest % map.box[d]);
      rest /= map.box[d];
      inside &= x >= 0 && x < s64(map.shape[d]);
      address += x * (d ? map.strides[d - 1] : map.size);
    }
    if (inside) f(swizzled(start + n * map.size, map.swizzle), address);
  }
}
template <class T> void read_corner(Warp& w, const Instruction& i, size_t at, int lane, T& corner) {
  for (size_t d = 0; at + d < i.a.size(); d++) corner[d] = w.slot(i.a[at + d])[lane];
}

// a = [map, to, mbarrier, coordinates ...].
inline void bulk_load(Machine& m, Warp& w, const Instruction& i, u32 active) {
  int lane = only_lane(active);
  s32 corner[5];
  read_corner(w, i, 7, lane, corner);
  TensorMap map = tensor_map(m, w.wide(i.a[0])[lane], i.a.size() - 7);
  u32 to = address_of(w, i, 1, lane), barrier = address_of(w, i, 4, lane);
  barrier_at(m, w, barrier);
  BulkLoad load{barrier, to, std::vector<u8>(box_bytes(map)), m.pc};
  m.inside(to, load.data.size());
  if (to % 128 || (map.swizzle && map.box[0] * map.size > map.swizzle))
    fail("a bulk load's alignment or box");
  elements(map, corner, to, [&](u32 shared, u64 global) {
    m.global(w, global, map.size, false, m.pc);
    memcpy(&load.data[shared - to], reinterpret_cast<void*>(global), map.size);
  });
  begin_copy(m, w, to, load.data.size());
  m.loads.push_back(std::move(load));
}
// All that a barrier counts, in the order in which they began.
inline bool Machine::land_loads(u32 address) {
  Barrier& b = barriers[address];
  auto lands = [&](BulkLoad& load) {
    if (load.barrier != address) return false;
    u32 size = load.data.size(), now = ++b.clock[b.agent];
    land(load.to, load.data.data(), size, load.pc, b.agent, now, false);
    b.bytes -= size;
    b.settle();
    return true;
  };
  size_t before = loads.size();
  std::erase_if(loads, lands);
  return loads.size() < before;
}

// a = [map, from, coordinates ...].  It reads when it is waited for.
inline void bulk_store(Machine& m, Warp& w, const Instruction& i, u32 active) {
  int lane = only_lane(active);
  u32 from = address_of(w, i, 1, lane);
  BulkStore store{tensor_map(m, w.wide(i.a[0])[lane], i.a.size() - 4), {}, from, m.pc};
  read_corner(w, i, 4, lane, store.corner);
  u32 size = box_bytes(store.map);
  m.inside(from, size);
  m.note_read(w, from, size, m.pc, m.store_agent(w), w.stores.committed + 1, true);
  w.stores.open.push_back(store);
}
inline void Machine::finish_stores(Warp& w, size_t keep) {
  w.stores.wait(keep, [&](BulkStore& store) {
    elements(store.map, store.corner, store.from, [&](u32 shared, u64 address) {
      global(w, address, store.map.size, true, store.pc);
      memcpy(reinterpret_cast<void*>(address), bytes(shared), store.map.size);
    });
  });
  u32& seen = w.clock[store_agent(w)];
  seen = std::max(seen, w.stores.finished());
}

inline Register copies([] {
  normal("cp.async", [](Machine& m, Warp& w, const Instruction& i, u32 active) {
    active_lanes(active, [&](int lane) { cp_async(m, w, i, lane); });
  });
  normal("cp.async.commit_group", [](Machine&, Warp& w, const Instruction&, u32) {
    w.copies.commit();
  });
  normal("cp.async.wait_group", [](Machine& m, Warp& w, const Instruction& i, u32) {
    finish_copies(m, w, i.a[0]);
  });
  normal("cp.async.wait_all", [](Machine& m, Warp& w, const Instruction&, u32) {
    w.copies.commit();
    finish_copies(m, w, 0);
  });
  normal("fence.proxy.async", [](Machine&, Warp& w, const Instruction&, u32) {
    join(w.fenced, w.clock);
    w.clock[w.id]++;
  });
  normal("mbarrier.init", make_barrier);
  normal("mbarrier.inval", end_barrier);
  normal("mbarrier.arrive", arrive);
  normal("mbarrier.expect_tx", [](Machine& m, Warp& w, const Instruction& i, u32 active) {
    int lane = only_lane(active);
    barrier_at(m, w, address_of(w, i, 1, lane)).bytes += w.slot(i.a[0])[lane];
  });
  together("mbarrier.wait", wait_barrier);
  normal("bulk.load", bulk_load);
  normal("bulk.store", bulk_store);
  normal("bulk.commit_group", [](Machine&, Warp& w, const Instruction&, u32) {
    w.stores.commit();
  });
  normal("bulk.wait_group", [](Machine& m, Warp& w, const Instruction& i, u32) {
    m.finish_stores(w, i.a[0]);
  });
});

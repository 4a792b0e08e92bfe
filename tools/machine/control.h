// How a CTA runs: warps one after the other until they wait, and what lets them go on.
#pragma once
#include "copies.h"
#include "products.h"

// shfl: a = [d, whether its source is in range or -1, x, lane, clamp, mode: idx up down bfly].
inline void shuffle(Machine&, Warp& w, const Instruction& i, u32 active) {
  u32 values[32], in_range[32];
  const u32 *x = w.slot(i.a[2]), *b = w.slot(i.a[3]), *c = w.slot(i.a[4]);
  for (u32 lane = 0; lane < 32; lane++) {
    u32 segment = c[lane] >> 8 & 31, by = b[lane] & 31;
    int first = lane & segment, limit = first | (c[lane] & 31 & ~segment), from = lane;
    if (i.a[5] == 0) from = first | (by & ~segment);
    if (i.a[5] == 1) from -= by;
    if (i.a[5] == 2) from += by;
    if (i.a[5] == 3) from ^= by;
    in_range[lane] = i.a[5] == 1 ? from >= limit : from <= limit;
    values[lane] = x[in_range[lane] ? from & 31 : lane];
  }
  keep_active<u32>(w.slot(i.a[0]), active, [&](int lane) { return values[lane]; });
  if (i.a[1] >= 0)
    keep_active<u32>(w.slot(i.a[1]), active, [&](int lane) { return in_range[lane]; });
}

// vote: a = [d, predicate, whether it is negated, mode: all any uni ballot].
inline u32 set_lanes(const u32* predicate, bool negated) {
  u32 found = 0;
  for (int lane = 0; lane < 32; lane++) found |= u32((predicate[lane] != 0) != negated) << lane;
  return found;
}
inline void vote(Machine&, Warp& w, const Instruction& i, u32 active) {
  u32 found = set_lanes(w.slot(i.a[1]), i.a[2]) & active;
  bool all = found == active, any = found != 0;
  u32 result = i.a[3] == 0 ? all : i.a[3] == 1 ? any : i.a[3] == 2 ? all || !any : found;
  keep_active<u32>(w.slot(i.a[0]), active, [&](int) { return result; });
}

// redux: a = [d, x].
template <class T, class F> void reduction(const std::string& name, F) {
  together("redux." + name, [](Machine&, Warp& w, const Instruction& i, u32 active) {
    const u32* x = w.slot(i.a[1]);
    T sum = get<T>(x, std::countr_zero(active));
    active_lanes(active & (active - 1), [&](int lane) { sum = F{}(sum, get<T>(x, lane)); });
    keep_active<T>(w.slot(i.a[0]), active, [&](int) { return sum; });
  });
}

inline void do_nothing(Machine&, Warp&, const Instruction&, u32) {}

inline Register control([] {
  normal("nop", do_nothing);
  normal("trap", [](Machine&, Warp&, const Instruction&, u32) { fail("trap"); });
  normal("bra", [](Machine&, Warp& w, const Instruction&, u32 active) { w.taken = active; });
  normal("ret", [](Machine&, Warp& w, const Instruction&, u32 active) { w.alive &= ~active; });
  together("bar.warp.sync", do_nothing);
  together("bar.sync", [](Machine& m, Warp& w, const Instruction& i, u32 active) {
    if (active != w.alive) fail("a barrier for some threads of a warp");
    w.barrier = i.a[0];
    w.barrier_threads = i.a[1] < 0 ? m.launch.threads : i.a[1];
    w.state = AT_BARRIER;
  });
  together("shfl", shuffle);
  together("vote", vote);
  together("elect", [](Machine&, Warp& w, const Instruction& i, u32 active) {  // the first lane
    keep_active<u32>(w.slot(i.a[0]), active, [](int) { return 0; });
    keep_active<u32>(w.slot(i.a[1]), active, [](int lane) { return lane == 0; });
  });
  reduction<u32>("add", [](u32 a, u32 b) { return a + b; });
  reduction<u32>("and", [](u32 a, u32 b) { return a & b; });
  reduction<u32>("or", [](u32 a, u32 b) { return a | b; });
  reduction<u32>("xor", [](u32 a, u32 b) { return a ^ b; });
  reduction<u32>("min.u32", [](u32 a, u32 b) { return std::min(a, b); });
  reduction<u32>("max.u32", [](u32 a, u32 b) { return std::max(a, b); });
  reduction<s32>("min.s32", [](s32 a, s32 b) { return std::min(a, b); });
  reduction<s32>("max.s32", [](s32 a, s32 b) { return std::max(a, b); });
});

// The lanes that run next, which are those furthest behind, and where; parked ones wait for others.
inline u32 next_lanes(Warp& w) {
  if (w.uniform) return w.alive;
  u32 can_run = w.alive & ~w.parked, lanes = 0;
  if (!can_run) fail("lanes of a warp wait at different instructions");
  w.pc = INT32_MAX;
  active_lanes(can_run, [&](int lane) { w.pc = std::min(w.pc, w.pcs[lane]); });
  active_lanes(w.alive, [&](int lane) { lanes |= u32(w.pcs[lane] == w.pc) << lane; });
  return lanes;
}

// After an instruction of these lanes: where they go on, and whether all are together again.
inline void advance(Warp& w, const Instruction& i, u32 lanes) {
  int next = i.pc + 1, target = w.taken ? i.a[0] : next;
  if (w.uniform && (!w.taken || w.taken == lanes)) {
    w.pc = target;
    return;
  }
  if (w.uniform) w.parked = 0;
  active_lanes(lanes, [&](int lane) { w.pcs[lane] = is_active(w.taken, lane) ? target : next; });
  if (!w.alive) return;
  w.pc = w.pcs[std::countr_zero(w.alive)];
  w.uniform = true;
  active_lanes(w.alive, [&](int lane) { w.uniform &= w.pcs[lane] == w.pc; });
  if (w.uniform) w.parked = 0;
}

// Until it waits or is done; false where it didn't run at all.
inline bool Machine::run_warp(Warp& w) {
  if (w.state != RUNS) return false;
  while (w.state == RUNS && w.alive) {
    u32 lanes = next_lanes(w);
    pc = w.pc;
    if (pc >= int(program.size())) fail("the program has no end");
    const Instruction& i = program[pc];
    if (i.operation.together && lanes != w.alive) {
      w.parked |= lanes;
      continue;
    }
    if (++steps > launch.limit) fail("too many steps");
    u32 active = lanes;
    if (i.guard >= 0) active &= set_lanes(w.slot(i.guard), i.negated);
    if (w.any_busy) check_busy(w, i);
    w.taken = 0;
    w.again = false;
    if (active) i.operation.run(*this, w, i, active);
    if (!w.again) advance(w, i, lanes);
  }
  if (!w.alive) w.state = DONE;
  return true;
}

// Warps meet: each knows all that the others did before.
inline void Machine::meet(const std::vector<Warp*>& who) {
  Clock clock(agents, 0), fenced(agents, 0);
  for (Warp* w : who) {
    join(clock, w->clock);
    join(fenced, w->fenced);
  }
  for (Warp* w : who) {
    w->clock = clock;
    w->fenced = fenced;
    w->clock[w->id]++;
    w->state = RUNS;
  }
}

// Let go on who has waited long enough; whether there is any.
inline bool Machine::release() {
  bool any = false;
  auto waiting = [&](State state, auto which) {
    std::vector<Warp*> found;
    for (Warp& w : warps)
      if (w.state == state && which(w)) found.push_back(&w);
    return found;
  };
  for (Warp& w : warps) {
    if (w.state != AT_BARRIER) continue;
    auto who = waiting(AT_BARRIER, [&](Warp& other) { return other.barrier == w.barrier; });
    if (who.size() * 32 < w.barrier_threads) continue;
    meet(who);
    any = true;
  }
  for (int group = 0; group < group_count; group++) {
    auto in_group = [&](Warp& w) { return w.id / 4 == group; };
    auto at_product = waiting(AT_PRODUCT, in_group), at_wait = waiting(AT_PRODUCT_WAIT, in_group);
    if (at_product.size() == 4) {
      meet(at_product);
      for (Warp* w : at_product) w->met = true;
      any = true;
    }
    if (at_wait.size() != 4) continue;
    for (Warp* w : at_wait) {
      w->products.wait(w->keep, [&](Product& product) { multiply(*w, product); });
      mark_busy(*w);
      u32& seen = w->clock[product_agent(*w)];
      seen = std::max(seen, w->products.finished());
      w->state = RUNS;
    }
    any = true;
  }
  if (any) return true;
  // Bulk loads are as late as they can be: they land when nothing else can run.
  for (Warp& w : warps)
    if (w.state == AT_MBARRIER && land_loads(w.barrier)) break;
  for (Warp& w : warps) {
    if (w.state != AT_MBARRIER || barriers[w.barrier].phase == w.parity) continue;
    w.state = RUNS;
    any = true;
  }
  return any;
}

inline u32 special(const Machine& m, const Warp& w, s64 which, int lane) {
  const s64* grid = m.launch.grid;
  s64 cta[] = {m.cta % grid[0], m.cta / grid[0] % grid[1], m.cta / grid[0] / grid[1]};
  s64 values[] = {32 * w.id + lane, 0, 0, m.launch.threads, 1, 1, cta[0], cta[1], cta[2],
                  grid[0], grid[1], grid[2], lane, w.id};
  return which < 14 ? values[which] : 0;  // of a cluster, of which there is none
}

inline void Machine::start_warp(Warp& w) {
  int threads = std::min(s64(32), launch.threads - 32 * w.id);
  w.alive = ALL_LANES >> (32 - threads);
  w.registers.assign(slots * 32, 0xfff7dead);  // NaN, before they are written
  w.busy.assign(slots, 0);
  w.clock.assign(agents, 0);
  w.clock[w.id] = 1;
  w.fenced.assign(agents, 0);
  for (int lane = 0; lane < 32; lane++) {
    for (auto [slot, value, wide] : constants)
      if (wide)
        w.wide(slot)[lane] = value;
      else
        w.slot(slot)[lane] = value;
    for (auto [slot, which] : specials) w.slot(slot)[lane] = special(*this, w, which, lane);
  }
}

inline void Machine::start_cta() {
  const int most_barriers = 64;
  warp_count = (launch.threads + 31) / 32;
  group_count = (warp_count + 3) / 4;
  readers = 2 * warp_count + group_count;
  agents = readers + most_barriers;
  shared.assign(launch.shared + 16, 0xff);
  barriers.clear();
  loads.clear();
  barriers_made = 0;
  size_t count = launch.check ? launch.shared / launch.granule + 16 : 0;
  written.assign(count, {});
  read_clock.assign(count * readers, 0);
  read_pc.assign(count * readers, 0);
  warps.clear();
  for (int id = 0; id < warp_count; id++) {
    warps.emplace_back().id = id;
    start_warp(warps.back());
  }
}

inline void Machine::run_cta() {
  start_cta();
  while (!std::all_of(warps.begin(), warps.end(), [](Warp& w) { return w.state == DONE; })) {
    bool ran = false;
    for (int n = 0; n < warp_count; n++) ran |= run_warp(warps[launch.warp_order[n]]);
    if (release() || ran) continue;
    std::string where = "deadlock; each warp's state and instruction:";
    for (Warp& w : warps) where += " " + std::to_string(w.state) + "@" + std::to_string(w.pc);
    fail(where);
  }
  for (Warp& w : warps) {
    w.stores.commit();
    finish_stores(w, 0);
  }
  pc = -1;
  if (!loads.empty()) fail("a bulk load is never waited for");
}

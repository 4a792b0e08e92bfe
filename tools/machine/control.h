// Runs a CTA: each warp until it waits, one after the other, and the end of waits.
#pragma once
#include "tensor_products.h"

// shfl: [d, x, lane, clamp, mode: idx up down bfly].
inline void shuffle(Step& s) {
  const u32 *x = s.slot(1), *by = s.slot(2), *clamp = s.slot(3);
  s.set<u32>(0, [&](u32 lane) {
    u32 segment = clamp[lane] >> 8 & 31, n = by[lane] & 31;
    int first = lane & segment, limit = first | (clamp[lane] & 31 & ~segment);
    int from[] = {int(first | (n & ~segment)), int(lane - n), int(lane + n), int(lane ^ n)};
    bool in_range = s[4] == 1 ? from[s[4]] >= limit : from[s[4]] <= limit;
    return x[in_range ? from[s[4]] : lane];
  });
}
template <class T, class F> void reduction(const std::string& name, F) {  // redux: [d, x]
  together("redux." + name, [](Step& s) {
    const u32* x = s.slot(1);
    T sum = get<T>(x, std::countr_zero(s.active));
    each(s.active & (s.active - 1), [&](int lane) { sum = F{}(sum, get<T>(x, lane)); });
    s.set<T>(0, [&](int) { return sum; });
  });
}
inline Table control([] {
  normal("nop", [](Step&) {});
  normal("trap", [](Step&) { fail("trap"); });
  normal("bra", [](Step& s) { s.w.taken = s.active; });
  normal("ret", [](Step& s) { s.w.alive &= ~s.active; });
  together("bar.warp.sync", [](Step&) {});
  together("bar.sync", [](Step& s) {
    if (s.active != s.w.alive) fail("a barrier for some threads of a warp");
    s.w.barrier = s[0];
    s.w.barrier_threads = s[1] < 0 ? s.m.launch.threads : s[1];
    s.w.state = AT_BARRIER;
  });
  together("shfl", shuffle);
  together("elect", [](Step& s) { s.set<u32>(1, [](int lane) { return lane == 0; }); });
  reduction<u32>("add", [](u32 a, u32 b) { return a + b; });
  reduction<u32>("and", [](u32 a, u32 b) { return a & b; });
  reduction<u32>("or", [](u32 a, u32 b) { return a | b; });
  reduction<u32>("min.u32", [](u32 a, u32 b) { return std::min(a, b); });
  reduction<u32>("max.u32", [](u32 a, u32 b) { return std::max(a, b); });
  reduction<f32>("min.f32", [](f32 a, f32 b) { return smaller(a, b); });
  reduction<f32>("max.f32", [](f32 a, f32 b) { return larger(a, b); });
  reduction<f32>("min.NaN.f32", [](f32 a, f32 b) { return smaller_or_nan(a, b); });
  reduction<f32>("max.NaN.f32", [](f32 a, f32 b) { return larger_or_nan(a, b); });
  reduction<s32>("min.s32", [](s32 a, s32 b) { return std::min(a, b); });
  reduction<s32>("max.s32", [](s32 a, s32 b) { return std::max(a, b); });
});

// The lanes that run next: the lanes furthest behind, without parked lanes, which wait for others.
inline u32 next_lanes(Warp& w) {
  if (w.uniform) return w.alive;
  u32 lanes = 0;
  if (!(w.alive & ~w.parked)) fail("lanes of a warp wait at different instructions");
  w.pc = INT32_MAX;
  each(w.alive & ~w.parked, [&](int lane) { w.pc = std::min(w.pc, w.pcs[lane]); });
  each(w.alive, [&](int lane) { lanes |= u32(w.pcs[lane] == w.pc) << lane; });
  return lanes;
}
// After an instruction of these lanes: their next instruction, and whether all lanes have met again.
inline void advance(Warp& w, const Instruction& i, u32 lanes) {
  int next = i.pc + 1, target = w.taken ? i.operands[0] : next;
  if (w.uniform && (!w.taken || w.taken == lanes)) {
    w.pc = target;
    return;
  }
  if (w.uniform) w.parked = 0;
  each(lanes, [&](int lane) { w.pcs[lane] = in(w.taken, lane) ? target : next; });
  if (!w.alive) return;
  w.pc = w.pcs[std::countr_zero(w.alive)];
  w.uniform = true;
  each(w.alive, [&](int lane) { w.uniform &= w.pcs[lane] == w.pc; });
}
inline u32 guarded(Warp& w, const Instruction& i) {
  if (i.guard < 0) return ALL_LANES;
  u32 lanes = 0;
  for (int lane = 0; lane < 32; lane++) lanes |= u32(w.slot(i.guard)[lane] != 0) << lane;
  return i.negated ? ~lanes : lanes;
}
// Run a warp until it waits or is done; false if it can't run.
inline bool run_warp(Machine& m, Warp& w) {
  if (w.state != RUNS) return false;
  while (w.state == RUNS && w.alive) {
    u32 lanes = next_lanes(w);
    m.pc = w.pc;
    const Instruction& i = m.program.at(w.pc);
    if (i.operation.together && lanes != w.alive) {
      w.parked |= lanes;
      continue;
    }
    if (++m.steps > m.launch.limit) fail("too many steps");
    if (w.any_busy) check_busy(m, w, i);
    Step step{m, w, i, lanes & guarded(w, i)};
    w.taken = w.again = 0;
    if (step.active) i.operation.run(step);
    if (!w.again) advance(w, i, lanes);
  }
  if (!w.alive) w.state = DONE;
  return true;
}

// Warps meet: each is ordered after everything that the others did before.
inline bool meet(Machine& m, const std::vector<Warp*>& who) {
  Clock clock(m.agents, 0), fenced(m.agents, 0);
  for (Warp* w : who) join(clock, w->clock), join(fenced, w->fenced);
  for (Warp* w : who) {
    w->clock = clock;
    w->fenced = fenced;
    w->clock[w->id]++;
    w->state = RUNS;
  }
  return true;
}
// Release warps whose wait is over; returns whether there is any.
inline bool release(Machine& m) {
  bool any = false;
  auto waiting = [&](State state, auto which) {
    std::vector<Warp*> found;
    for (Warp& w : m.warps)
      if (w.state == state && which(w)) found.push_back(&w);
    return found;
  };
  for (Warp& w : m.warps) {
    if (w.state != AT_BARRIER) continue;
    auto who = waiting(AT_BARRIER, [&](Warp& other) { return other.barrier == w.barrier; });
    if (who.size() * 32 >= w.barrier_threads) any = meet(m, who);
  }
  for (int group = 0; group < m.group_count; group++) {
    auto in_group = [&](Warp& w) { return w.id / 4 == group; };
    auto at_product = waiting(AT_PRODUCT, in_group), at_wait = waiting(AT_PRODUCT_WAIT, in_group);
    if (at_product.size() == 4) any = meet(m, at_product);
    for (Warp* w : at_product) w->met = w->state == RUNS;
    if (at_wait.size() != 4) continue;
    for (Warp* w : at_wait) finish_products(m, *w), w->state = RUNS;
    any = true;
  }
  if (any) return true;
  // Bulk loads and tensor memory's products run as late as possible: when nothing else can run.
  auto is_over = [&](Warp& w) { return m.barriers[w.barrier].phase != w.parity; };
  for (Warp& w : m.warps)
    if (w.state == AT_MBARRIER && land_loads(m, w.barrier)) break;
  for (Warp& w : m.warps)
    if (w.state == AT_MBARRIER && !is_over(w) && run_committed(m, w.barrier)) break;
  for (Warp* w : waiting(AT_MBARRIER, is_over)) w->state = RUNS, any = true;
  return any;
}

inline void start_warp(Machine& m, Warp& w) {
  w.alive = ALL_LANES >> (32 - std::min(s64(32), m.launch.threads - 32 * w.id));
  w.registers.assign(m.slots * 32, UNWRITTEN);
  w.busy.assign(m.slots, 0);
  w.clock.assign(m.agents, 0);
  w.fenced = w.clock;
  w.clock[w.id] = 1;
  const s64* grid = m.launch.grid;
  s64 x = m.cta % grid[0], y = m.cta / grid[0] % grid[1], z = m.cta / grid[0] / grid[1];
  for (s64 lane = 0; lane < 32; lane++) {
    s64 values[] = {32 * w.id + lane, 0, 0, m.launch.threads, 1, 1, x, y, z,
                    grid[0], grid[1], grid[2], lane, w.id, 0};  // in the order of ptx.py's SPECIAL
    for (auto [slot, which] : m.specials) w.slot(slot)[lane] = values[which];
    for (auto [slot, value, is_wide] : m.constants)
      if (is_wide) put<u64>(w.slot(slot), lane, value);
      else put<u32>(w.slot(slot), lane, value);
  }
}
inline void start_cta(Machine& m) {
  const int most_barriers = 64;
  m.warp_count = (m.launch.threads + 31) / 32;
  m.group_count = (m.warp_count + 3) / 4;
  m.readers = m.tensor_agent() + 1;
  m.agents = m.readers + most_barriers;
  m.shared.assign(m.launch.shared + 16, 0xff);
  m.barriers.clear();
  m.loads.clear();
  m.tensor_memory = {};
  m.barriers_made = 0;
  size_t count = m.launch.check ? m.launch.shared / m.launch.granule + 16 : 0;
  m.shadow.start(count, m.readers);
  m.warps.assign(m.warp_count, {});
  for (int id = 0; id < m.warp_count; id++) {
    m.warps[id].id = id;
    start_warp(m, m.warps[id]);
  }
}
inline void run_cta(Machine& m) {
  start_cta(m);
  while (!std::all_of(m.warps.begin(), m.warps.end(), [](Warp& w) { return w.state == DONE; })) {
    bool ran = false;
    for (int n = 0; n < m.warp_count; n++) ran |= run_warp(m, m.warps[m.launch.warp_order[n]]);
    if (release(m) || ran) continue;
    std::string where = "deadlock; each warp's state and instruction:";
    for (Warp& w : m.warps) where += " " + std::to_string(w.state) + "@" + std::to_string(w.pc);
    fail(where);
  }
  for (Warp& w : m.warps) {
    w.stores.commit();
    finish_stores(m, w, 0);
  }
  if (!m.loads.empty()) fail("a bulk load is never waited for");
  end_tensor_memory(m);
}

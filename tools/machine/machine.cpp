// Runs PTX on a CPU.  ptx.py decodes the text, and memory.py calls these functions.
#include "arithmetic.h"
#include "control.h"

// A list of numbers, after its length.
static std::vector<s64> next_list(const s64*& at) {
  s64 size = *at++;
  at += size;
  return {at - size, at};
}

#pragma GCC visibility push(default)
extern "C" {
int knows(const char* name) { return operations().count(name); }

// `code` has three lists for each instruction, its guard's slot and whether it is negated, its
// operands, and the registers that it touches; then constants and special registers.
Machine* new_machine(const char** names, s64 count, s64 slots, const s64* code) {
  auto* m = new Machine;
  m->slots = slots;
  for (int pc = 0; pc < count; pc++) {
    auto guard = next_list(code), operands = next_list(code), registers = next_list(code);
    const Operation& operation = operations().at(names[pc]);
    m->program.push_back({operation, guard[0], bool(guard[1]), pc, operands, registers});
  }
  auto constants = next_list(code), specials = next_list(code);
  for (size_t n = 0; n < constants.size(); n += 3)
    m->constants.push_back({constants[n], constants[n + 1], constants[n + 2]});
  for (size_t n = 0; n < specials.size(); n += 2)
    m->specials.push_back({specials[n], specials[n + 1]});
  return m;
}
void free_machine(Machine* m) { delete m; }

// The error, or nothing.
const char* run(Machine* m, const Launch* launch) {
  m->launch = *launch;
  m->findings.clear();
  m->storages.clear();
  m->steps = 0;
  m->error = "";
  for (s64 n = 0; n < launch->storage_count; n++)
    m->storages.push_back({launch->starts[n], launch->ends[n], launch->allowed[n],
                           launch->writers[n], launch->readers[n]});
  try {
    for (s64 n = 0; n < launch->cta_count; n++) {
      m->cta = launch->ctas[n];
      run_cta(*m);
    }
  } catch (const std::exception& fault) {
    m->error = fault.what();
  }
  return m->error.c_str();
}

// The current position: steps, CTA, instruction.
void where(const Machine* m, s64* out) {
  out[0] = m->steps;
  out[1] = m->cta;
  out[2] = m->pc;
}
int findings(const Machine* m, Finding* out, int most) {
  int count = 0;
  for (auto& [_, finding] : m->findings)
    if (count < most) out[count++] = finding;
  return count;
}
}

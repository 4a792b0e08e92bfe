"""An emulator of NVIDIA GPUs: runs the PTX that Triton compiles, on CPU tensors.

In addition to the numbers, it checks:

* Registers, shared memory and the destinations of unfinished copies hold NaN, so that early reads
  are seen.
* Each global access is within the elements of a tensor of the launch, each shared access within the
  allocation, and both are aligned.  Otherwise it raises a Fault; so does a deadlock.
* Races in shared and tensor memory, by vector clocks of warps, products' reads, bulk copies and
  mbarriers.  A copy arrives, and a product reads its operands, only when a wait for it ends.
* A proxy fence is between a warp's write and a product or bulk store that reads it.
* No element of global memory is written by one warp and read by another, or written with another
  value, in the same launch without an order between the two.

It differs from a GPU: sums of products are float32, rounded to nearest after each product, in the
order of k.  It doesn't see what ptxas fuses or reorders.  The four warps of a group meet at each
wgmma, which Triton assumes and the ISA doesn't promise.  The lanes of a warp don't race with each
other.

Blackwell's tcgen05 (sm_100, sm_103): a product runs when a wait for a later commit ends, and not
earlier.  Until then, its operands in shared memory must not be written.  Products with different
sums or shapes have no order without a wait.  The registers of a load from tensor memory are NaN
until its wait.  LLVM moves arithmetic before that wait, which the ISA forbids, but ptxas makes it
correct with scoreboards.  Such an "early load" is a finding, not a race.  An A of 64 rows in tensor
memory has the layout of sums.  Not supported: clusters (cta_group::2), scales, tcgen05.cp and
.shift.  tcgen05.fence isn't required, because Triton doesn't write it.
"""

import os
from pathlib import Path

# Set before Triton is imported: compile, don't interpret; an explicit default; and a separate
# cache, whose kernels have PTX instead of machine code.
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "machine"
os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
os.environ["TRITON_CACHE_DIR"] = str(CACHE / "triton")

"""The PTX that Triton compiles for an NVIDIA GPU, run instruction by instruction on CPU tensors.

It checks, beside the numbers:

* Registers, shared memory and copies on their way hold NaN.
* Each global access lies in elements of a tensor that the launch was given, each shared one in the
  allocation, and both are aligned.  Else there is a Fault, as where all wait for each other.
* Races in shared and tensor memory, by vector clocks over warps, products' reads, bulk copies and
  mbarriers.  A copy lands, and a product reads its operands, only when somebody waits for it.
* What a warp writes and a product or a bulk store reads has a proxy fence on its way.
* No element of global memory is written by one warp and read by another, or written with another
  value, in the same launch without an order between the two.

It differs from a GPU: sums of products are float32, rounded to nearest after each, in the order of
k.  What ptxas may do (fuse, reorder) isn't seen.  The four warps of a group meet at each wgmma, as
Triton counts on and the ISA doesn't promise.  Lanes of a warp don't race with each other.

Blackwell's tcgen05 (sm_100, sm_103): a product runs when somebody waits for a commit behind it, and
no earlier; until then, what it reads in shared memory is not to be written.  Those of unlike sums
or shapes have no order without a wait.  What a load of tensor memory fills is NaN until its wait.
LLVM moves arithmetic before that wait, which the ISA forbids and ptxas's scoreboards make good:
"early load" is told with the findings, and is no race.  A of 64 rows in tensor memory lies as sums
do.  Not there: clusters (cta_group::2), scales, tcgen05.cp and .shift; nobody asks for
tcgen05.fence, which Triton doesn't write.
"""

import os
from pathlib import Path

# All before Triton is imported: compile, don't interpret; the default, said; and a cache of its
# own, in which kernels have PTX in the place of machine code.
CACHE = Path(__file__).resolve().parents[2] / ".cache" / "machine"
os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
os.environ["TRITON_CACHE_DIR"] = str(CACHE / "triton")

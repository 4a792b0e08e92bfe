"""The PTX that Triton compiles for an NVIDIA GPU, run instruction by instruction on CPU tensors.

It checks, beside the numbers:

* Registers, shared memory and copies on their way hold NaN.
* Each global access lies in elements of a tensor that the launch was given, each shared one in the
  allocation, and both are aligned.  Else there is a Fault, as where all wait for each other.
* Races in shared memory, by vector clocks over warps, wgmma's reads, bulk copies and mbarriers.
  A copy lands, and a wgmma reads its operands, only when somebody waits for it.
* What a warp writes and wgmma or a bulk store reads has a proxy fence on its way.
* No element of global memory is written by one warp and read by another, or written with another
  value, in the same launch without an order between the two.

It differs from a GPU: sums of products are float32, rounded to nearest after each, in the order of
k.  What ptxas may do (fuse, reorder) isn't seen.  The four warps of a group meet at each wgmma, as
Triton counts on and the ISA doesn't promise.  Lanes of a warp don't race with each other.

tcgen05 (sm_100) would need: tensor memory of 128 lanes by 512 columns with its allocator and a
shadow like that of shared memory; products that run on their own until their commit arrives at
an mbarrier, and operands as wgmma's, with scales; loads and stores of tensor memory that wait for
themselves only; and clusters of two CTAs, whose warps and shared memory are one machine's.
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

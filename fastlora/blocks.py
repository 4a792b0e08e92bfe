"""How many rows of a matrix are worked on at a time, where a whole one would leave the cache."""

from torch import Tensor

# Elements in one block of dropout, or of what is made float32 for a while.  On 2 cores with 1 MiB
# of L2 cache each, dropout with 2^20 took 0.84 ms for 4 Mi elements of bfloat16, 2^18 took 1.15 ms;
# where a launch costs more than memory does, blocks are larger.
_CPU_BLOCK, _DEVICE_BLOCK = 2**20, 2**24


def rows_at_a_time(x: Tensor) -> int:
    """How many rows of x make a block: it stays in cache, or on a device it pays its launches."""
    return max(1, (_CPU_BLOCK if x.device.type == "cpu" else _DEVICE_BLOCK) // x.shape[-1])

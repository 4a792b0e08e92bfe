"""A first learning rate for a rank, from a published sweep."""

from bisect import bisect_left

SOURCE = (
    "learning rate: each was best for a fifth of the models in the supervised sweep of "
    "tinker-cookbook (sft_sweep.md: 35 models, batches of 128, 780 steps), whose lora_alpha is 32"
)
# The lowest and the highest of these rates for each rank, in 2026-08.  The sweep tried 4e-5, 1e-4,
# 3e-4, 1e-3 and 3e-3.  At rank 4, 3e-4 was best for 29 of 35 models; at rank 64, 3e-4 for 10 and
# 1e-3 for 11 of 22.  https://github.com/thinking-machines-lab/tinker-cookbook/blob/main/
# tinker_cookbook/recipes/chat_sl/results/sft_sweep.md
_BEST = {
    1: (1e-4, 3e-4),
    2: (3e-4, 3e-4),
    4: (3e-4, 3e-4),
    16: (3e-4, 1e-3),
    64: (3e-4, 1e-3),
    128: (3e-4, 1e-3),
}


def learning_rates(r: int) -> tuple[float, float] | None:
    """The lowest and the highest rate for a rank whose scale is 32 / r; None above rank 128.

    A rank between two ranks of the sweep gets the range of both.
    """
    ranks = list(_BEST)
    i = bisect_left(ranks, r)
    if i == len(ranks):
        return None
    near = [r] if r in _BEST else ranks[i - 1 : i + 1]
    rates = [rate for rank in near for rate in _BEST[rank]]
    return min(rates), max(rates)

"""The batches of training: their order, which all trials share, and several of them as one."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..projection import shown

Batch = dict[str, Tensor]
_PADDING = {"labels": -100}


class Feed:
    """The batches of ``data``, over and over, in an order that the seed fixes.

    ``skip`` of them were taken before.  ``count`` is how many are taken in all (None: as many as
    there are): of what can be read only once, these are read now.  Raises ValueError for a list
    with what is no batch.
    """

    def __init__(
        self,
        data: Iterable[Mapping[str, Any]],
        seed: int,
        skip: int = 0,
        count: int | None = None,
    ) -> None:
        if isinstance(data, Iterator):  # a generator, for one
            data = list(islice(data, count))
        if isinstance(data, list | tuple):
            data = [as_batch(batch) for batch in data]
        self.data, self.seed, self.taken = data, seed, 0
        self._batches = self._forever()
        for _ in range(skip):
            next(self._batches)
        self.taken = skip

    def take(self, count: int) -> list[Batch]:
        """The next batches."""
        self.taken += count
        return [next(self._batches) for _ in range(count)]

    def _forever(self) -> Iterator[Batch]:
        epoch = 0
        while True:
            # A shuffling loader draws its order when its first batch is asked for.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed + epoch)
                batches = iter(self.data)
                first = next(batches, None)
            if first is None:
                what = "gives no batch" if epoch == 0 else "ends, and can't be read again"
                raise ValueError(f"data {what}: give a list of batches or a DataLoader")
            yield as_batch(first)
            for batch in batches:
                yield as_batch(batch)
            epoch += 1


def as_batch(batch: Any) -> Batch:
    """Its tensors by name.

    Raises ValueError unless it maps names to tensors with one number of examples, and has labels.
    """
    items = batch.items() if hasattr(batch, "items") else ()
    found = {name: tensor for name, tensor in items if isinstance(tensor, Tensor)}
    if "labels" not in found or any(tensor.dim() == 0 for tensor in found.values()):
        raise ValueError(
            f"a batch is {shown(batch)}, but must map names to tensors, [examples, …], with "
            "'labels'"
        )
    if len({len(tensor) for tensor in found.values()}) > 1:
        sizes = {name: len(tensor) for name, tensor in found.items()}
        raise ValueError(f"a batch has tensors of different numbers of examples: {sizes}")
    return found


def joined(batches: Sequence[Batch], causal: bool) -> list[Batch]:
    """One batch of the examples of all, filled up on the right to the longest.

    They stay apart where their names or shapes differ otherwise, and where lengths differ and
    neither an ``attention_mask`` tells the model nor what is ``causal`` needs none.
    """
    apart, first = list(batches), batches[0]
    like = "attention_mask" if "attention_mask" in first else "labels" if causal else ""
    if any(batch.keys() != first.keys() for batch in apart):
        return apart
    whole = {}
    for name in first:
        parts = [batch[name] for batch in apart]
        if len({part.shape[1:] for part in parts}) > 1:
            shapes = [batch[like].shape for batch in apart if like]
            if [part.shape for part in parts] != shapes or any(len(each) != 2 for each in shapes):
                return apart
            length, fill = max(each[1] for each in shapes), _PADDING.get(name, 0)
            parts = [pad(part, (0, length - part.shape[1]), value=fill) for part in parts]
        whole[name] = torch.cat(parts)
    return [whole]

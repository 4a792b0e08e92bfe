"""A question about a tensor's values, asked once: on a GPU the answer waits for it."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Once:
    """The answers so far; a tensor that changed is looked at again."""

    def __init__(self) -> None:
        self._seen = WeakTensorKeyDictionary()  # of each tensor: its version, and the answer

    def ask(self, tensor: Tensor, question: Callable[[Tensor], bool]) -> bool:
        """False in a graph of torch.compile's, which holds no value of a tensor."""
        if torch.compiler.is_compiling():
            return False
        version = None if tensor.is_inference() else tensor._version
        seen = self._seen.get(tensor)
        if seen is None or seen[0] != version:
            seen = self._seen[tensor] = version, question(tensor)
        return seen[1]

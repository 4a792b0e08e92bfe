"""Which tests want equal bits of two computations: those may lean on one processor's BLAS."""

import inspect
import re
from collections.abc import Callable
from functools import cache
from types import FunctionType

_EQUAL_BITS = re.compile(r"\bequal\b|\brtol=0\b(?!\.)")


@cache
def wants_equal_bits(function: Callable) -> bool:
    """By its own lines, or by those of what it calls in its file."""
    if _EQUAL_BITS.search(inspect.getsource(function)):
        return True
    helpers = (function.__globals__.get(name) for name in function.__code__.co_names)
    return any(
        isinstance(helper, FunctionType)
        and helper.__module__ == function.__module__
        and helper is not function
        and wants_equal_bits(helper)
        for helper in helpers
    )

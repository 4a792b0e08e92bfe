"""Calls ``fastlora.auto()`` in the processes that a program of ``python -m fastlora run`` starts.

Python imports this file at its start, because ``run`` puts its folder on PYTHONPATH.  The file
removes this folder from ``sys.path``.  Then it runs the ``sitecustomize`` that it hides, if any.
"""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

_here = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != _here]
try:
    from fastlora.automatic import from_environment
except ImportError:
    pass  # a Python of another environment, without fastlora
else:
    from_environment()
_other = PathFinder.find_spec(__name__, sys.path)
if _other is not None and _other.loader is not None:
    sys.modules[__name__] = module_from_spec(_other)
    _other.loader.exec_module(sys.modules[__name__])

"""Calls ``fastlora.auto()`` in a program of ``python -m fastlora run``, and in its processes.

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
    from fastlora.integrations.patches import from_environment
except ImportError:
    pass  # a Python of another environment, without fastlora
else:
    try:
        from_environment()
    except ValueError as error:  # after which Python would go on
        sys.stderr.write(f"fastlora: {error}\n")
        os._exit(2)
_other = PathFinder.find_spec(__name__, sys.path)
if _other is not None and _other.loader is not None:
    sys.modules[__name__] = module_from_spec(_other)
    _other.loader.exec_module(sys.modules[__name__])

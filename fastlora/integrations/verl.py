"""The entry point in ``verl.plugins``, which ``import verl`` loads in each worker.

Importing this file calls ``fastlora.auto()`` if ``FASTLORA=1`` is set, and does nothing otherwise.
"""

from .patches import from_environment

from_environment()

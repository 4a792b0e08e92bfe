"""Other packages' layers and models: the only places that import those packages."""

import os


def is_disabled() -> bool:
    """Whether ``FASTLORA_DISABLE`` asks that other packages' layers be left alone."""
    return os.environ.get("FASTLORA_DISABLE", "") not in ("", "0")

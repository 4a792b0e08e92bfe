"""fastlora: fused LoRA linear layers for PyTorch, with little cost beyond the frozen layer.

    model = fastlora.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear"))

Data passes through four folders: layers (``layers``), ops (``ops``), backends (``backends``) and
Triton kernels (``kernels``).  ``peft`` injects PEFT's adapters and speeds up PEFT's models,
``packing`` packs base models, and ``adapters`` works on saved adapters.  ``reference`` has the
formula in plain PyTorch.

The first use of a name imports torch and the rest of fastlora.  If torch is imported already, then
``import fastlora`` does so at once.
"""

import os
import sys

if (
    sys.argv[:2] == ["-m", "run"]
    and sys.orig_argv[-len(sys.argv)] == __name__
    and sys.path[:1] == [os.getcwd()]
):
    # ``python -m fastlora run``: no file of the working directory replaces a standard module here.
    del sys.path[0]

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .integrations.patches import auto  # noqa: F401  # it needs no torch, so that a program can start with it
from .version import __version__  # noqa: F401

# Public names of 0.4, and what replaces them.
_REMOVED = {
    "apply_lora": "fastlora.get_peft_model, or fastlora.replace_linears without PEFT",
    "LoRAConfig": "peft.LoraConfig",
    "save_adapter": "model.save_pretrained",
    "merge_lora": "fastlora.merged, or model.merge_adapter",
    "unmerge_lora": "fastlora.merged, or model.unmerge_adapter",
    "remove_lora": "model.unload",
    "print_trainable_parameters": "model.print_trainable_parameters",
}

if TYPE_CHECKING:
    from .public import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        """A name of ``public``, a folder that importing ``public`` imports, or ``trainer``."""
        if name.startswith("__") and name != "__all__":  # such as inspect asks every module for
            raise AttributeError(f"module 'fastlora' has no attribute {name!r}")
        if name == "trainer":  # not in ``public``: it needs transformers
            return import_module(".trainer", __name__)
        public = import_module(".public", __name__)
        names = getattr(public, "__all__", ())  # not there yet while the import runs
        globals().update({each: getattr(public, each) for each in names}, __all__=names)
        if name in _REMOVED:
            text = f"fastlora.{name} is gone since 0.5: use {_REMOVED[name]} (docs/from-0.4.md)"
            # Python drops the text of an AttributeError in "from fastlora import NAME".
            is_import = sys._getframe(1).f_globals["__name__"] == "importlib._bootstrap"
            raise ImportError(text) if is_import else AttributeError(text)
        if name not in globals():
            raise AttributeError(f"module 'fastlora' has no attribute {name!r}")
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})


if "torch" in sys.modules and not TYPE_CHECKING:
    __getattr__("__all__")

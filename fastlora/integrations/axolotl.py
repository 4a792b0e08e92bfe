"""axolotl's plugin.  In the YAML:

plugins:
  - fastlora.integrations.axolotl.FastLoRAPlugin

axolotl 0.21 also loads it by the entry point in ``axolotl.plugins``.  Without these lines, it acts
only with ``FASTLORA=1`` (or settings as JSON) in the environment.
"""

import logging
import os
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from .patches import is_on, optimize_or_log, settings_in, show_log

_LOG = logging.getLogger("fastlora")
# axolotl switches its kernels on by itself unless one of these keys is set.
_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
_MERGED = "fastlora_merged_sampling"


class FastLoRAArgs(BaseModel):
    """The plugin's keys: arguments of :func:`fastlora.optimize`; None means its default.

    ``fastlora_merged_sampling`` adds :class:`fastlora.trainer.MergedSampling`, for GRPO.
    """

    fastlora_gated_mlps: bool | None = None
    fastlora_frozen_linears: bool | None = None
    fastlora_loss: bool | None = None
    fastlora_merged_sampling: bool | None = None


class FastLoRAPlugin(BasePlugin):
    """Optimizes the model after axolotl has loaded its adapter.

    axolotl's fused LoRA kernels replace the forwards of attention and MLP modules, which then don't
    call their LoRA layers.  The plugin switches these kernels off, unless the YAML sets one of
    their keys to true.  In that case axolotl's kernels run, and the plugin only logs a warning.
    """

    def register(self, cfg: Any) -> None:
        if _settings(cfg) is None:
            return
        show_log()
        # axolotl's filter drops INFO of loggers with another name than its own.
        for each in [*_LOG.filters]:
            if type(each).__module__.startswith("axolotl."):
                _LOG.removeFilter(each)
        for key in _KERNELS:
            if cfg.get(key) is None:
                cfg[key] = False

    def get_input_args(self) -> str:
        return f"{__name__}.{FastLoRAArgs.__name__}"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        from ..trainer import MergedSampling  # later, for a short chain of imports

        is_asked = cfg.get(_MERGED) and _settings(cfg) is not None
        return [MergedSampling()] if is_asked else []

    def post_model_load(self, cfg: Any, model: Any) -> None:
        settings = _settings(cfg)
        if settings is None:
            return
        if theirs := [key for key in _KERNELS if cfg.get(key)]:
            _LOG.warning(
                "axolotl's own kernels are on, so fastlora changes nothing: remove %s from the "
                "YAML to run fastlora",
                ", ".join(theirs),
            )
        elif not is_on() or settings != _of_environment():  # otherwise auto() has done it
            optimize_or_log(model, **settings)


def _settings(cfg: Any) -> dict[str, Any] | None:
    """The arguments of ``optimize``; None if neither the YAML nor ``FASTLORA`` names the plugin."""
    plugin = f"{__name__}.{FastLoRAPlugin.__name__}"
    is_named = plugin in [name.replace(":", ".") for name in cfg.get("plugins") or ()]
    settings = _of_environment()
    if settings is None and not is_named:
        return None
    names = set(FastLoRAArgs.model_fields) - {_MERGED}
    given = {name.removeprefix("fastlora_"): cfg.get(name) for name in names}
    return (settings or {}) | {name: value for name, value in given.items() if value is not None}


def _of_environment() -> dict[str, Any] | None:
    return settings_in(os.environ.get("FASTLORA", ""))

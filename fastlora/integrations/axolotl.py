"""axolotl's plugin.  In the YAML:

plugins:
  - fastlora.integrations.axolotl.FastLoRAPlugin
"""

import logging
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from ..automatic import optimize_or_log, show_log

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
        show_log()
        _LOG.filters.clear()  # by axolotl's filter, loggers of other packages drop INFO
        for key in _KERNELS:
            if cfg.get(key) is None:
                cfg[key] = False

    def get_input_args(self) -> str:
        return f"{__name__}.{FastLoRAArgs.__name__}"

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        from ..trainer import MergedSampling  # later, for a short chain of imports

        return [MergedSampling()] if cfg.get(_MERGED) else []

    def post_model_load(self, cfg: Any, model: Any) -> None:
        if theirs := [key for key in _KERNELS if cfg.get(key)]:
            _LOG.warning(
                "axolotl's own kernels are on, so fastlora changes nothing: remove %s from the "
                "YAML to run fastlora",
                ", ".join(theirs),
            )
            return
        names = set(FastLoRAArgs.model_fields) - {_MERGED}
        given = {name.removeprefix("fastlora_"): cfg.get(name) for name in names}
        settings = {name: value for name, value in given.items() if value is not None}
        optimize_or_log(model, **settings)

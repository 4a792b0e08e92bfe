"""A plugin file for ms-swift, with two callbacks.

swift sft … --external_plugins "$(python -m fastlora path swift)" --callbacks fastlora

``fastlora`` optimizes the model before training; ``fastlora_merged`` is for GRPO, and samples with
merged weights (:class:`fastlora.trainer.MergedSampling`).
"""

from swift.callbacks import callbacks_map

from fastlora.trainer import MergedSampling, Optimize

callbacks_map["fastlora"] = lambda args, trainer: Optimize()
callbacks_map["fastlora_merged"] = lambda args, trainer: MergedSampling()

"""A plugin file for ms-swift: its callback ``fastlora`` optimizes the model before training.

swift sft … --external_plugins "$(python -m fastlora path swift)" --callbacks fastlora
"""

from typing import Any

from swift.callbacks import callbacks_map

from fastlora.trainer import Optimize


class FastLoRACallback(Optimize):
    """:class:`fastlora.trainer.Optimize`, with the constructor that ms-swift calls."""

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__()


callbacks_map["fastlora"] = FastLoRACallback

"""transformers' Trainer with checkpoints of the adapter alone; only this file imports transformers.

    from fastlora.trainer import AdapterTrainer

``import fastlora`` doesn't import it.
"""

import os
from typing import Any

import torch
from torch import nn

from .layers.modules import has_sharded, unwrap
from .model.checkpoint import load_adapter, save_adapter
from .model.inject import check_injection, check_model, injection_of
from .model.quantizer import saving_adapters_alone

try:
    from transformers import Trainer
    from transformers.trainer import TRAINING_ARGS_NAME
except ImportError as error:
    raise ImportError(
        "fastlora.trainer needs transformers and accelerate: "
        "pip install 'fastlora-kernels[trainer]'"
    ) from error


class AdapterTrainer(Trainer):
    """``transformers.Trainer`` for a model that ``apply_lora`` or ``load_adapter`` gave adapters.

    Arguments and use are Trainer's.  A checkpoint holds PEFT's files of the adapter in place of the
    whole model; ``resume_from_checkpoint`` and ``load_best_model_at_end`` read them, and a resumed
    run goes on to the last bit where Trainer's own does.  For another trainer, name both:
    ``class AdapterSeq2SeqTrainer(AdapterTrainer, Seq2SeqTrainer)``.

    Raises TypeError for what is no model, and ValueError for a PEFT model and one without adapters,
    which are transformers.Trainer's, and under FSDP and DeepSpeed, whose checkpoints hold the whole
    model.
    """

    def __init__(self, model: Any = None, *args: Any, **kwargs: Any) -> None:
        if model is not None:  # before anything is made of it
            _check_model(model)
        with saving_adapters_alone():
            super().__init__(model, *args, **kwargs)
        _check_model(self.model)  # which ``model_init`` may have made
        _check_engine(self)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """What Trainer's does, with the adapter for the model."""
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        save_adapter(self.model, folder)
        processing = self.processing_class
        if processing is None:
            processing = getattr(self.data_collator, "tokenizer", None)
        if processing is not None:
            processing.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_adapter(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if os.path.isdir(self.state.best_model_checkpoint):
            load_adapter(self.model, self.state.best_model_checkpoint)
        else:  # on another machine's disk; it warns
            super()._load_best_model()


def _check_model(model: nn.Module) -> None:
    """Raise ValueError or TypeError unless save_adapter and load_adapter will take it."""
    check_model(model)
    injection = injection_of(model)
    if injection is None:
        raise ValueError(
            f"{type(model).__name__} has no adapters of fastlora for AdapterTrainer: call "
            "fastlora.apply_lora(model, config) first; a PEFT model, or a model without adapters, "
            "is transformers.Trainer's"
        )
    check_injection(unwrap(model), injection)


def _check_engine(trainer: Trainer) -> None:
    """Raise ValueError where checkpoints are the engine's, and hold the whole model."""
    engine = "DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP"
    sharded = trainer.is_fsdp_enabled or has_sharded(trainer.model)
    if trainer.is_deepspeed_enabled or sharded:
        raise ValueError(
            f"AdapterTrainer can't save adapters alone under {engine}, whose checkpoints hold the "
            "whole model: use transformers.Trainer, and fastlora.save_adapter when it has trained"
        )

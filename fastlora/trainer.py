"""A transformers Trainer that checkpoints only the adapter, and merged sampling for TRL's trainers.

    from fastlora.trainer import AdapterTrainer, MergedSampling

Only this file imports transformers; ``import fastlora`` doesn't import it.
"""

import functools
import os
from types import MethodType
from typing import Any

import torch
from torch import nn

from .layers.modules import has_sharded, unwrap
from .model.checkpoint import load_adapter, save_adapter
from .model.inject import check_injection, check_model, injection_of
from .model.trainable import saving_adapters_only
from .sampling import merged

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer import TRAINING_ARGS_NAME
except ImportError as error:
    raise ImportError(
        "fastlora.trainer needs transformers and accelerate: "
        "pip install 'fastlora-kernels[trainer]'"
    ) from error


class AdapterTrainer(Trainer):
    """A ``transformers.Trainer`` for a model with adapters of ``apply_lora`` or ``load_adapter``.

    It takes the same arguments as Trainer.  A checkpoint holds the adapter in PEFT's files instead
    of the whole model; ``resume_from_checkpoint`` and ``load_best_model_at_end`` read these files.
    A resumed run gives the same bits as an uninterrupted one wherever Trainer's does.  To use it
    with another trainer, derive from both:
    ``class AdapterSeq2SeqTrainer(AdapterTrainer, Seq2SeqTrainer)``.

    Raises TypeError if ``model`` is not a module.  Raises ValueError for a PEFT model and a model
    without adapters (use transformers.Trainer for both), and under FSDP and DeepSpeed, whose
    checkpoints hold the whole model.
    """

    def __init__(self, model: Any = None, *args: Any, **kwargs: Any) -> None:
        if model is not None:  # check before Trainer changes the model
            _check_model(model)
        with saving_adapters_only():
            super().__init__(model, *args, **kwargs)
        _check_model(self.model)  # again, because ``model_init`` may have made another model
        _check_engine(self)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write the files of Trainer's ``_save``, with the adapter in place of the model."""
        if not self.args.should_save:
            return
        folder = output_dir or self.args.output_dir
        save_adapter(self.model, folder)
        # The tokenizer or processor and the arguments, as Trainer writes them.
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
        else:  # the checkpoint is on another machine's disk; Trainer's method warns of that
            super()._load_best_model()


def _check_model(model: nn.Module) -> None:
    """Raise ValueError or TypeError unless save_adapter and load_adapter accept the model."""
    check_model(model)
    injection = injection_of(model)
    if injection is None:
        raise ValueError(
            f"{type(model).__name__} has no adapters of fastlora for AdapterTrainer: call "
            "fastlora.apply_lora(model, config) first; for a PEFT model, or a model without "
            "adapters, use transformers.Trainer"
        )
    check_injection(unwrap(model), injection)


def _check_engine(trainer: Trainer) -> None:
    """Raise ValueError under FSDP and DeepSpeed, which write checkpoints of the whole model."""
    engine = "DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP"
    sharded = trainer.is_fsdp_enabled or has_sharded(trainer.model)
    if trainer.is_deepspeed_enabled or sharded:
        raise ValueError(
            f"AdapterTrainer can't save only adapters under {engine}, whose checkpoints hold the "
            "whole model: use transformers.Trainer, and call fastlora.save_adapter after training"
        )


class MergedSampling(TrainerCallback):
    """Makes ``model.generate`` sample with merged weights during training, as in TRL's GRPOTrainer.

    Each call of ``generate`` runs inside :class:`fastlora.merged`, so a token costs one product per
    layer instead of three.  Afterwards the base weights have their exact bits again.  ``keep`` says
    where the original weights are kept meanwhile (see :class:`fastlora.merged`).

    Use it as ``trainer.add_callback(MergedSampling())``.  The end of training restores
    ``model.generate``.  An error in training doesn't, because Trainer then calls no callback:
    ``generate`` keeps sampling merged, correctly, until :meth:`put_back` or the next training.

    Training raises ValueError before its first step if the model can't be merged, or if vLLM or
    continuous batching samples, because these don't call ``generate``.
    """

    def __init__(self, *, keep: str = "device") -> None:
        self.keep = keep
        self._replaced: tuple[dict, Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.put_back()
        for name in ("use_vllm", "use_transformers_continuous_batching"):
            if getattr(args, name, False):
                raise ValueError(f"{name}: MergedSampling works only with model.generate")
        model: Any = unwrap(kwargs["model"])
        with merged(model, keep=self.keep):  # raises here, before the first step, if it can't merge
            generate = model.generate

        keep = self.keep
        if getattr(generate, "__self__", None) is model:
            original = generate.__func__
        else:  # a function that someone set on the model; it takes no self
            original = lambda _, *inputs, **named: generate(*inputs, **named)  # noqa: E731

        @functools.wraps(generate)
        def sample(model: Any, *inputs: Any, **settings: Any) -> Any:
            with merged(model, keep=keep):
                return original(model, *inputs, **settings)

        self._replaced = vars(model), vars(model).get("generate")
        # A bound method, so that a deepcopy of the model gets one that is bound to the copy.
        vars(model)["generate"] = MethodType(sample, model)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.put_back()

    def put_back(self) -> None:
        """Restore the ``generate`` that the model had before training."""
        if self._replaced is None:
            return
        (entries, before), self._replaced = self._replaced, None
        del entries["generate"]
        if before is not None:  # an instance attribute that the user set
            entries["generate"] = before

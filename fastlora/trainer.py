"""transformers' Trainer with checkpoints of the adapter alone, and merged samples for TRL's.

    from fastlora.trainer import AdapterTrainer, MergedSampling

Only this file imports transformers; ``import fastlora`` doesn't import it.
"""

import functools
import os
from types import MethodType
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from .layers.modules import has_sharded, unwrap
from .model.checkpoint import load_adapter, save_adapter
from .model.declare import saving_adapters_alone
from .model.inject import check_injection, check_model, injection_of
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


_sampling: WeakSet[nn.Module] = WeakSet()  # models inside of a merged ``generate``


class _Sample:
    """A model's ``generate`` that samples merged: it stands in the model's ``__dict__``."""

    def __init__(self, model: Any, keep: str) -> None:
        generate = model.generate
        functools.update_wrapper(self, generate)  # with its attributes, before this one's own
        self.keep, self.is_on = keep, True
        self.before = vars(model).get("generate")  # another one, on this model only; or None
        if getattr(generate, "__self__", None) is model:
            self.theirs = generate.__func__
        else:
            self.theirs = lambda _, *inputs, **settings: generate(*inputs, **settings)
        vars(model)["generate"] = MethodType(self, model)  # a copy of the model gets its own

    def __call__(self, model: Any, *inputs: Any, **settings: Any) -> Any:
        if not self.is_on or model in _sampling:
            return self.theirs(model, *inputs, **settings)
        _sampling.add(model)
        try:
            with merged(model, keep=self.keep):
                return self.theirs(model, *inputs, **settings)
        finally:
            _sampling.discard(model)

    def leave(self, model: Any) -> None:
        """Put back what this model had before, if it has this one still."""
        if getattr(vars(model).get("generate"), "__func__", None) is not self:
            return
        del vars(model)["generate"]
        if self.before is not None:
            is_method = getattr(self.before, "__func__", None) is self.theirs
            is_copied = is_method and self.before.__self__ is not model
            vars(model)["generate"] = MethodType(self.theirs, model) if is_copied else self.before


class MergedSampling(TrainerCallback):
    """For TRL's GRPOTrainer and its like: while it trains, ``model.generate`` samples merged.

    Each call of ``generate`` runs inside :class:`fastlora.merged`, at the base model's speed, and
    leaves the very bits.  ``keep`` is that one's: where the originals are meanwhile.

    ``trainer.add_callback(MergedSampling())``.  When training ends, ``generate`` is the model's own
    again.  An error in training ends it without a callback: until :meth:`put_back`, or the next
    training of the model with any MergedSampling, ``generate`` samples merged, and leaves the bits.
    A second MergedSampling on the same model takes over from the first.

    Training raises ValueError before its first step where the model can't be merged, and where vLLM
    or continuous batching samples, which don't call ``generate``.
    """

    def __init__(self, *, keep: str = "device") -> None:
        self.keep = keep
        self._placed: tuple[Any, _Sample] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.put_back()
        model: Any = unwrap(kwargs["model"])
        while isinstance(sample := getattr(vars(model).get("generate"), "__func__", None), _Sample):
            sample.leave(model)  # another callback's
        for name in ("use_vllm", "use_transformers_continuous_batching"):
            if getattr(args, name, False):
                raise ValueError(f"{name}: MergedSampling is for samples by model.generate alone")
        with merged(model, keep=self.keep):  # or it raises, now
            pass
        self._placed = model, _Sample(model, self.keep)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.put_back()

    def put_back(self) -> None:
        """Let ``generate`` be what it was before training."""
        if self._placed is not None:
            (model, sample), self._placed = self._placed, None
            sample.is_on = False  # another function may call it
            sample.leave(model)

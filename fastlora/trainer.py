"""Callbacks for transformers' Trainer, and for trainers that derive from it.

    from fastlora.trainer import MergedSampling, Optimize

Only this file imports transformers; ``import fastlora`` doesn't import it.
"""

import functools
import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from .automatic import check_settings, log_line, optimize_and_log, optimize_silently, show_log
from .layers.modules import unwrap
from .peft.learning import embedding_notes
from .peft.merged import merge_adapter, why_not_sent
from .peft.targets import peft_layers
from .sampling import merged

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "fastlora.trainer needs transformers and accelerate: "
        "pip install 'fastlora-kernels[trainer]'"
    ) from error


def __getattr__(name: str) -> Any:
    if name == "AdapterTrainer":  # an AttributeError would lose the text in a from-import
        raise ImportError(
            "AdapterTrainer is gone since 0.5: use transformers.Trainer (docs/from-0.4.md)"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Optimize(TrainerCallback):
    """Optimizes the Trainer's PEFT model before training, also one that the trainer makes.

    Use it as ``callbacks=[Optimize()]``, with transformers.Trainer, TRL's trainers and others that
    derive from it.  ``settings`` are the arguments of :func:`fastlora.optimize`.  One line on
    stderr, or in the log that the program has set up, says how many layers are fast.  Warnings name
    adapters that have no gradient in the first step, and, at the first checkpoint, embeddings that
    share a weight but train apart, or that don't train although tokens are new.

    The model is optimized at the end of the Trainer's ``__init__``, before DDP or FSDP wraps it,
    and again at the start of training, because ``model_init`` may have made another model.
    Training raises ValueError before its first step if the model has no LoRA layers of PEFT.
    """

    def __init__(self, **settings: Any) -> None:
        check_settings(settings)
        self.settings = settings
        self._logged: WeakSet[nn.Module] = WeakSet()
        self._saved = False
        show_log()

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if kwargs.get("model") is not None and peft_layers(kwargs["model"]):
            self._optimize(kwargs["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._optimize(kwargs["model"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        notes = [] if self._saved else embedding_notes(kwargs["model"])
        self._saved = True
        for note in notes:
            log_line(logging.WARNING, note)

    def _optimize(self, model: Any) -> None:
        inner = unwrap(model)
        (optimize_silently if inner in self._logged else optimize_and_log)(model, **self.settings)
        self._logged.add(inner)


# PEFT's models between ``merge_adapter`` and ``unmerge_adapter``, with what restores them.
_merged: WeakKeyDictionary[nn.Module, ExitStack] = WeakKeyDictionary()


def _restore(model: nn.Module) -> bool:
    """Restore a model that MergedSampling's ``merge_adapter`` merged; whether there was a merge."""
    undo = _merged.pop(model, None)
    if undo is not None and peft_layers(model):  # merge_and_unload() keeps the merged weights
        undo.close()
    return undo is not None


class MergedSampling(TrainerCallback):
    """Makes a trainer sample with merged weights, and restores the base's bits, as for TRL's GRPO.

    Use it as ``trainer.add_callback(MergedSampling())``.  It replaces methods of the model during
    training:

    * Without vLLM, ``generate``: each call runs inside :class:`fastlora.merged`, so a token costs
      one product per layer instead of three.
    * With vLLM (``use_vllm``), PEFT's ``merge_adapter`` and ``unmerge_adapter``, which the trainer
      calls to send merged weights.  ``merge_adapter`` takes PEFT's arguments and gives PEFT's names
      and values, dense ones for a packed base; ``unmerge_adapter`` restores the original weights.

    Afterwards the base weights have their exact bits again.  ``keep`` is
    :class:`fastlora.merged`'s.

    The end of training restores the methods.  An error in training ends it without a callback: the
    methods then stay replaced until :meth:`put_back`, or the end of this callback's next training.
    A merged model stays merged until :meth:`put_back`, or until its next training with any
    MergedSampling.

    Training raises ValueError before its first step if the model can't be merged (see
    :class:`fastlora.merged`), or if continuous batching samples, because it doesn't call
    ``generate``.  With vLLM also if the model is not a PeftModel, and if an adapted weight is tied
    to another module's: vLLM has one weight for both.
    """

    def __init__(self, *, keep: str = "corrections") -> None:
        self.keep = keep
        self._placed: list[tuple[Any, str, Any, Any]] = []  # model, name, our method, earlier one

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.put_back()
        model: Any = unwrap(kwargs["model"])
        # A PeftModel takes these two methods from its base_model.
        inner = model.base_model if hasattr(model, "merge_adapter") else model
        _restore(inner)
        # TRL's asynchronous trainers have a server, and no switch.
        if getattr(args, "use_vllm", hasattr(args, "vllm_server_base_url")):
            if reason := why_not_sent(model):
                raise ValueError(reason)
            merge_adapter(inner, self.keep).close()  # raises here, before the first step
            self._place(inner, "merge_adapter", self._merge)
            self._place(inner, "unmerge_adapter", self._unmerge)
        elif getattr(args, "use_transformers_continuous_batching", False):
            raise ValueError(
                "use_transformers_continuous_batching: MergedSampling works only with "
                "model.generate and vLLM"
            )
        else:
            with merged(model, keep=self.keep):
                pass
            self._place(model, "generate", self._sample)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.put_back()

    def put_back(self) -> None:
        """Restore the methods and the weights that the model had before training."""
        placed, self._placed = self._placed, []
        for model, name, method, before in placed:
            _restore(model)
            if vars(model).get(name) is method:  # not another function around it
                del vars(model)[name]
                if before is not None:
                    vars(model)[name] = before

    def _place(self, model: Any, name: str, ours: Callable) -> None:
        """Replace a method of this model by ``ours``, which gets the replaced method first.

        A partial, because a copy of the model then has a method of the copy.
        """
        theirs = getattr(model, name)
        method = functools.update_wrapper(functools.partial(ours, theirs, model), theirs)
        self._placed.append((model, name, method, vars(model).get(name)))
        vars(model)[name] = method

    def _sample(self, theirs: Callable, model: Any, *inputs: Any, **settings: Any) -> Any:
        if not self._placed:
            return theirs(*inputs, **settings)
        with merged(model, keep=self.keep):
            return theirs(*inputs, **settings)

    def _merge(self, theirs: Callable, model: Any, *inputs: Any, **settings: Any) -> None:
        if not self._placed:
            return theirs(*inputs, **settings)
        if model in _merged and (inputs or settings):
            raise ValueError("the model is merged already: call unmerge_adapter() first")
        _restore(model)  # after a failed synchronization, the adapters may have changed
        _merged[model] = merge_adapter(model, self.keep, *inputs, **settings)

    def _unmerge(self, theirs: Callable, model: Any) -> None:
        if not _restore(model):
            theirs()

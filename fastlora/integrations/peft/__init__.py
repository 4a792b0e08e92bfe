"""PEFT's LoRA layers, sped up in place.

:mod:`.linear` is what a layer becomes, :mod:`.reading` and :mod:`.moment` say which calls it takes,
and :mod:`.swap` does and undoes it.  None is imported before ``fastlora.optimize`` meets a layer of
PEFT's.
"""

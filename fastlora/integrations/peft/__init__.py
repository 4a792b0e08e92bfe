"""PEFT's LoRA layers, sped up in place.

:mod:`.linear` is what a sped-up layer becomes, :mod:`.eligibility` says which calls it takes,
:mod:`.swap` does and undoes it.  None is imported before ``fastlora.optimize`` meets a PEFT layer.
"""

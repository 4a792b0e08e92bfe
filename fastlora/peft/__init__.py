"""PEFT's models, sped up in place.

:mod:`.layer` is what a layer becomes, :mod:`.reading` and :mod:`.moment` say which calls it takes,
and :mod:`.swap` does and undoes it.  This folder alone imports PEFT, and only where a model with
PEFT's layers is met: its doors, :mod:`.optimize`, :mod:`.coverage` and :mod:`.check`, do without.
"""

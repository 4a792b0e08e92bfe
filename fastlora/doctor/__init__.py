"""``python -m fastlora doctor``: what is here, what would run, and whether it works.

:mod:`.report` is the whole, :mod:`.call` and :mod:`.self_test` are parts of it.
"""

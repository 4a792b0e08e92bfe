"""The call of an op: its records, the checks of its arguments, and how rows of x are divided.

:mod:`.projection` has the records, :mod:`.rows` the segments of x, and :mod:`.checks` the errors.
"""

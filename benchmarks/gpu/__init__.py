"""What a visit to a machine with a GPU does: ``gpu_visit.py`` runs the steps, one process each.

``facts`` (the device, and the ceilings it reaches), ``suite`` (the tests), ``layers`` (candidates
side by side, over the frozen layer), ``launches`` (each kernel alone), ``tuning`` (tiles and
plans).  A step's work is a list of items.  Its ``journal`` keeps what every item gave, so that a
crash, which on a GPU takes the process with it, costs one item: the step starts again behind it.
"""

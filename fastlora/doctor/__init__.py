"""``python -m fastlora doctor``: what is here, what would run, and whether it works."""

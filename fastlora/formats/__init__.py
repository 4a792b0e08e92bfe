"""Packed weights: what a format's tensors mean, in torch's own operations.  It knows no vendor."""

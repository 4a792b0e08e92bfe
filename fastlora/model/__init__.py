"""Your own model: which layers get adapters, injecting, merging and saving them."""

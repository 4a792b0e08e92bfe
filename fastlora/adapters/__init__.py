"""Adapters after their training, as they lie on a disk: resized, summed, in llama.cpp's format."""

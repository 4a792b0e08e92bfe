"""Packs the weights of whole models: ``fastlora.pack``, and ``fastlora.load_packed``."""

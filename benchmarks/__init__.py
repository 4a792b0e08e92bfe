"""Benchmarks of fastlora and other LoRA implementations; README.md describes them."""

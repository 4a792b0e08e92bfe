"""Many LoRA configurations on one base, side by side: ``fastlora.sweep``."""

"""Other projects' tests of LoRA, run with and without fastlora, and compared test by test."""

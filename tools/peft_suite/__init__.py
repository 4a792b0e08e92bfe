"""PEFT's tests, run with and without fastlora, and compared test by test."""

"""Triton kernels and their launchers: tensors in, tensors out.  Installed as ``fastlora.kernels``.

Nothing here knows an ``nn.Module``, and only ``fastlora.backends`` imports it.
"""

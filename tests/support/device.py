"""Where the tests run: on the GPU if there is one, else on the CPU, kernels interpreted."""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":  # read when the kernels are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

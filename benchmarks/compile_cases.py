"""The launches that the compile report looks at: every default config, in every form of its use."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.kernels import gemm_lowrank, project, weight_grad
from fastlora.kernels.config import (
    DEFAULTS,
    Call,
    Config,
    GemmConfig,
    ProjectConfig,
    WeightGradConfig,
)


@dataclass(frozen=True)
class Case:
    """One call of a launcher with a config.  ``form``: what the op calls the result."""

    config: Config
    form: str
    r: int = 16
    projections: int = 1
    dtype: str = "bfloat16"
    adapter: str = "float32"
    precision: str = "ieee"  # of float32
    masked: bool = False
    bias: bool = False
    M: int = 8192
    K: int = 4096
    N: int = 4096

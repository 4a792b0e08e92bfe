"""The launchers of all kernels, and the records, rules and modules that their callers need.

A launcher has the name of its module, so the package ``kernels`` can't offer it under that name.
"""

from . import config, faults, gemm_config, launch, plan, replay, target
from .capture import CapturedCall, capture_call
from .common import dropout_threshold
from .config import LONGEST
from .dequant import dequant
from .faults import ptxas
from .gated import gated, gated_backward, why_not_gated
from .gemm_int8_lowrank import gemm_int8_lowrank
from .gemm_lowrank import gemm_lowrank
from .gemm_lowrank_few_rows import gemm_lowrank_few_rows, one_launch_pays
from .launch import Launch, intercept
from .lowrank import lowrank
from .packed import FLOAT8, FOUR_BIT, INT8, Packed, lies_in_rows
from .plan import Plan, low_rank_pays, plan_for
from .project import project
from .quantize_rows import quantize_rows
from .row_loss import row_loss
from .segments import SegmentNumbers
from .target import TARGETS, target_of, use_target
from .weight_grad import one_pass_pays, weight_grad

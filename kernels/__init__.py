"""Triton kernels and their launchers: tensors in, tensors out.  Installed as ``fastlora.kernels``.

The package knows nothing of ``nn.Module``; only ``fastlora.backends`` imports it.  Reading order:
on the device ``common``, ``segments``, ``sum_planes``, ``project``, ``lowrank``, ``packed``,
``gemm_lowrank`` (the kernel of y and dx), ``weight_grad``, ``dequant``, ``gated``, ``row_loss``; on
the host ``launch``, ``target``, ``faults``, ``config``, ``defaults``, ``plan``, ``capture``,
``replay``.
"""

from . import defaults, replay  # fills the tables that launchers choose from
from .capture import CapturedCall, capture_call
from .common import dropout_threshold
from .dequant import dequant
from .faults import ptxas
from .gated import gated, gated_backward, why_not_gated
from .gemm_lowrank import Scales, gemm_lowrank, one_launch_pays
from .launch import Launch, intercept
from .lowrank import lowrank
from .packed import FLOAT8, FOUR_BIT, INT8, Packed, lies_in_rows
from .plan import Plan, low_rank_pays, plan_for
from .project import Rounded, project
from .row_loss import row_loss
from .segments import SegmentNumbers
from .target import TARGETS, target_of, use_target
from .weight_grad import one_pass_pays, weight_grad

"""Triton kernels and their launchers: tensors in, tensors out.  Installed as ``fastlora.kernels``.

The package knows nothing of ``nn.Module``; only ``fastlora.backends`` imports it.  The kernel
``NAME_kernel`` and its launcher ``NAME`` are in NAME.py, and ``launchers`` collects the launchers.

Reading order: on the device ``common``, ``segments``, ``packed``, ``base_product``, and the kernels
``sum_planes``, ``project``, ``lowrank``, ``gemm_lowrank`` (of y and dx), ``gemm_lowrank_few_rows``,
``quantize_rows``, ``gemm_int8_lowrank``, ``weight_grad``, ``dequant``, ``gated``, ``row_loss``; on
the host ``launch``, ``target``, ``faults``, ``config``, ``defaults``, ``plan``, ``capture``,
``replay``.
"""

if __name__ == "kernels":  # a clone is on sys.path, and hides Hugging Face's package
    import os
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    _others = [each for each in sys.path if not os.path.exists(f"{each or '.'}/kernels/lowrank.py")]
    _spec = PathFinder.find_spec("kernels", _others)
    if _spec and _spec.loader:
        sys.modules["kernels"] = _module = module_from_spec(_spec)
        _spec.loader.exec_module(_module)
    else:
        # Missing at the first use: transformers imports a package to see that it has no version.
        __file__, __path__ = None, []

        def __getattr__(name: str) -> None:
            if name.startswith("__"):
                raise AttributeError(name)
            raise ModuleNotFoundError("No module named 'kernels'", name="kernels")

else:
    from . import defaults  # fills the tables that launchers choose from

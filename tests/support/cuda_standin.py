"""A stand-in for a GPU that launches nothing: Triton's real host side, for CPU tensors.

    import cuda_standin  # before Triton is imported: it sets TRITON_INTERPRET=0
    cuda_standin.install()

After that, the package's kernels accept CPU tensors as if they were on an H100 (sm_90).  The host
side runs unchanged: launchers, binders, cache keys, tensor maps, Triton's C launcher.  Only
libcuda.so.1 is replaced, by cuda_standin.c, which counts launches and refuses the same arguments as
CUDA.  No kernel runs, so results are uninitialized memory.  Base products, which torch computes,
are replaced by products of tiny matrices; so the time of a call is its host time.

Use it in a process of its own.  A launch then costs the host as much as on a GPU, except for the
driver's part and torch's look-up of the current device and stream.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

# Triton reads both when it is imported.  The second is Triton's default, set explicitly.
os.environ["TRITON_INTERPRET"] = "0"  # "0", because marks.py would set it
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

_SOURCE = Path(__file__).with_suffix(".c")
_library: ctypes.CDLL


class _Kernel(ctypes.Structure):
    """The struct of cuda_standin.c that counts the launches of one kernel."""


_Kernel._fields_ = [
    ("name", ctypes.c_char_p),
    ("launches", ctypes.c_long),
    ("next", ctypes.POINTER(_Kernel)),
]


def why_not() -> str:
    """Why the stand-in can't be built here; "" if it can."""
    if _compiler() is None:
        return "there is no C compiler"
    if not _headers().joinpath("cuda.h").exists():
        return "this Triton comes without cuda.h"
    return ""


def install() -> None:
    """Make Triton's launches and the package's kernels, on CPU tensors, use the stand-in.

    Raises RuntimeError with :func:`why_not`'s reason if it can't be built.
    """
    global _library
    if reason := why_not():
        raise RuntimeError(f"the stand-in for CUDA can't be built: {reason}")
    folder = _built()
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "cache")  # its cubins can't run on any GPU
    _library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)

    import triton
    from triton.backends.nvidia.driver import CudaDriver

    from fastlora.kernels import target

    driver = CudaDriver()
    # replace methods that need a GPU
    driver.get_device_capability = lambda device: (9, 0)
    driver.get_current_device = lambda: 0
    driver.set_current_device = driver.get_current_stream = int
    triton.runtime.driver.set_active(driver)
    target._of_cpu = target.TARGETS["sm_90"]
    _compile_little()
    _make_products_tiny()
    # Large buffers come from the heap, so that freed memory is reused, as by torch on a GPU.
    ctypes.CDLL(None).mallopt(-3, 2**25)
    ctypes.CDLL(None).mallopt(-1, 2**30)


@dataclass
class Counts:
    """The counts of one block: launches by kernel name, and the number of encoded tensor maps."""

    launches: Counter[str] = field(default_factory=Counter)
    tensor_maps: int = 0

    @property
    def total(self) -> int:
        return self.launches.total()


@contextmanager
def counted() -> Iterator[Counts]:
    """Count launches and tensor maps in the block.  The counts are set when it ends."""
    counts, before = Counts(), _so_far()
    yield counts
    after = _so_far()
    counts.launches, counts.tensor_maps = after[0] - before[0], after[1] - before[1]


def torch_kernels(step: Callable[[], object]) -> int:
    """The number of kernels torch would launch in ``step()``, without views and empty tensors.

    The profiler counts them, because a dispatch mode would change the dispatch of fastlora's calls.
    """
    with torch.autograd.profiler.profile() as profile:
        step()
    return sum(_launched_in(each) for each in profile.function_events if each.cpu_parent is None)


def _launched_in(event: torch.autograd.profiler_util.FunctionEvent) -> int:
    """The number of kernels that this operation calls, or 1 if it is a kernel itself."""
    return sum(map(_launched_in, event.cpu_children)) or _is_kernel(event.name)


@cache
def _is_kernel(name: str) -> bool:
    packet = getattr(torch.ops.aten, name.removeprefix("aten::"), None)
    if packet is None or "empty" in name or not name.startswith("aten::"):
        return False
    operation = getattr(packet, packet.overloads()[0])
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return not (operation.is_view or operation.has_kernel_for_dispatch_key(composite))


def _so_far() -> tuple[Counter[str], int]:
    launches: Counter[str] = Counter()
    kernel = ctypes.POINTER(_Kernel).in_dll(_library, "standin_kernels")
    while kernel:
        each = kernel.contents
        launches[each.name.decode()] += each.launches
        kernel = each.next
    return launches, ctypes.c_long.in_dll(_library, "standin_tensor_maps").value


def _built() -> Path:
    """The folder of the library.  The library is built once for each version of the sources."""
    sources = [Path(__file__).read_bytes(), _SOURCE.read_bytes(), str(_headers()).encode()]
    version = hashlib.sha256(b"".join(sources)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir(), f"fastlora-cuda-standin-{os.getuid()}-{version}")
    library = folder / "libcuda.so.1"
    if not library.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        unfinished = folder / f"unfinished-{os.getpid()}"
        options = ["-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1", f"-I{_headers()}"]
        subprocess.run([_compiler(), *options, _SOURCE, "-o", unfinished], check=True)
        unfinished.replace(library)
        # older Tritons link against this name
        folder.joinpath("libcuda.so").symlink_to(library.name)
    return folder


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")


def _headers() -> Path:
    return Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "include"


def _compile_little() -> None:
    """Compile only kernels that have tensor maps, and only as far as a launch needs.

    A launch needs the boxes of the tensor maps and the size of shared memory.  Every other kernel
    gets empty metadata without compilation.
    """
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.compiler import ASTSource

    make_ir, add_stages = ASTSource.make_ir, CUDABackend.add_stages

    def make_little_ir(self, *context) -> object:
        return make_ir(self, *context) if "tensordesc" in str(self.signature) else self.name

    def add_little_stages(self, stages: dict, *options) -> None:
        add_stages(self, stages, *options)
        compiled = {name: stages[name] for name in ("ttir", "ttgir", "llir")}
        stages |= {name: partial(lowered, stage) for name, stage in compiled.items()}
        stages |= {"ptx": named, "cubin": lambda ptx, metadata: b"no machine code"}

    def lowered(stage: Callable, module: object, metadata: dict) -> object:
        if not isinstance(module, str):
            return stage(module, metadata)
        metadata |= {"name": module, "shared": 0, "tmem_size": 0, "tensordesc_meta": []}
        for scratch in ("global_scratch", "profile_scratch"):
            metadata |= {f"{scratch}_size": 0, f"{scratch}_align": 1}
        return module

    def named(llir: str, metadata: dict) -> str:
        if "name" not in metadata:
            metadata["name"] = re.search(r"define .*ptx_kernel.* @(\w+)\(", llir)[1]
        return llir

    ASTSource.make_ir, CUDABackend.add_stages = make_little_ir, add_little_stages


def _make_products_tiny() -> None:
    """Replace base products in the modules that launch kernels; the torch backend keeps its own."""
    import fastlora.backends.triton

    tiny, real_linear = torch.ones(2, 2), torch.nn.functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        real_linear(tiny, tiny)
        return x.new_empty(len(x), len(weight))

    def made_tiny(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*operands: Tensor, out: Tensor | None = None, **factors: float) -> Tensor:
            product(*[tiny] * len(operands), out=tiny, **factors)
            left, right = operands[-2:]
            return left.new_empty(len(left), right.shape[1]) if out is None else out

        return call

    products = {"addmm": made_tiny(torch.addmm), "mm": made_tiny(torch.mm)}
    with_tiny = SimpleNamespace(**vars(torch) | products)
    for name, module in list(sys.modules.items()):
        if name.startswith((fastlora.backends.triton.__name__, "fastlora.kernels.")):
            replaced = {"torch": with_tiny, "linear": linear}
            vars(module).update({key: replaced[key] for key in replaced.keys() & vars(module)})

"""Captures a call as a torch.fx graph of its torch operations and its kernel launches.

torch.fx makes a function of the graph, which replays the call.  Printed (``CapturedCall.source``),
the function of h = x lora_aᵀ is this, where the columns are summed in eight parts:

    def forward(self, stream, t0, t1):
        workspace = buffer()
        at_workspace = workspace.data_ptr()
        h = buffer_1()
        constant_0 = self.constant_0
        at_t0 = t0.data_ptr();  t0 = None
        at_t1 = t1.data_ptr();  t1 = None
        at_h = h.data_ptr()
        add = at_workspace + 0;  at_workspace = None
        project = launch(8, 8, 1, stream, …, (at_t0, (at_t1,), (at_h,), (add,), …));  …
        sum_planes = launch(8, 1, 1, stream, …, ((add,), (at_h,), 8192, …));  …
        _held = held(workspace);  workspace = _held = None
        return [h]

The inputs are t0, t1 …  A buffer is made like a tensor of one element, expanded: that takes half
the time of a shape and a dtype.  Buffers that only launches use lie in one allocation, the
workspace, and share its bytes where they are needed at different times.  torch.fx lets go of a
value after its last use, but an address holds no tensor.  So a call of ``_held`` is the last use of
a launch's buffers.

The capture runs the call on stand-ins, tensors of the device "meta".  Launchers ask for shapes of
tensors that don't exist yet, Triton asks for alignments, and a failure leaves nothing half done.  A
torch function mode records each operation, also views: without it, backends would have to name
their operations a second time, and a forgotten one would give wrong results.
"""

from collections.abc import Callable, Hashable, Sequence, Set
from copy import copy
from functools import partial
from operator import add, getitem
from types import MethodDescriptorType, MethodType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import DisableTorchFunction
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import INTERPRETED
from .launch import Launch, recording

_BUFFERS = (Tensor.new_empty, torch.empty_like)  # functions that make buffers
_ALIGNED = 512  # bytes, like torch's allocations on a GPU
# torch.fx writes these values into the source.  Any other value is a constant of the replay.
_LITERALS = (type(None), bool, int, float, str, torch.dtype, torch.layout, torch.memory_format)


class CapturedCall(NamedTuple):
    replay: Callable[..., list[Tensor | None]]  # takes the stream, then the tensors
    source: str
    kernels: list[Any]  # Triton's, which unload their code when they are freed
    identities: Set[str]  # each kernel's name, and the hash of its code
    device: int | None = None  # a GPU's number


def capture_call(
    function: Callable[..., Sequence[Tensor | None]],
    tensors: Sequence[Tensor | None],
    settings: Sequence[Hashable],
) -> CapturedCall:
    """Capture ``function(tensors, *settings)`` for all tensors of the same kind.

    The caller of a replay has to keep the tensors alive until it returns.
    """
    # The caller's modes see replays, but no stand-ins.  A view made in inference mode doesn't know
    # its base, and so has no address.
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        recorder = _Recorder(tensors)
        with recorder, recording(recorder.add_launch):
            results = function(recorder.stand_ins, *settings)
        with DisableTorchFunction():
            return recorder.captured(results)


class _Recorder(TorchFunctionMode):
    """Makes a node of each operation on stand-ins, and answers for their device and address."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.device = next(tensor.device for tensor in tensors if tensor is not None)
        self.graph = Graph()
        self.nodes: dict[int, Node] = {}  # by the id of the value
        self.alive: list[Any] = []  # values, so that no id is reused
        self.constants = SimpleNamespace()
        self.buffers: dict[Node, Tensor] = {}
        self.acts: set[Node] = set()  # have effects: needed even if their results aren't used
        self.addresses: dict[Node, Node] = {}
        self.modulo_16: dict[Node, int] = {}  # addresses of the inputs
        self.launches: list[Node] = []
        self.uses: dict[Node, list[int]] = {}  # the numbers of launches that get its address
        self.kernels: list[Any] = []
        self.identities: set[str] = set()
        self.stream = object()
        self._stands_for(self.stream, self.graph.placeholder("stream"))
        self.stand_ins: list[Tensor | None] = [None] * len(tensors)
        with DisableTorchFunction():
            for i, tensor in enumerate(tensors):
                node = self.graph.placeholder(f"t{i}")
                if tensor is not None:
                    self.stand_ins[i] = stand_in = torch.empty_strided(
                        tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
                    )
                    self._stands_for(stand_in, node)
                    self.modulo_16[node] = tensor.data_ptr() & 15

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if getattr(function, "__name__", "") == "data_ptr" and arguments[0].is_meta:
            # Callers read only the address modulo 16, and that it isn't 0, which is no address.
            base = self.nodes[id(_base(arguments[0]))]
            return 2**20 + self.modulo_16.get(base, 0) + _offset(arguments[0])
        if getattr(function, "__self__", None) is Tensor.device:
            return self.device
        out = keywords.get("out")  # then it is the result, and nothing need be computed
        with DisableTorchFunction():  # and with it the caller's modes
            result = function(*arguments, **keywords) if out is None else out
            several = result if isinstance(result, tuple) else (result,)
            made = {i: each for i, each in enumerate(several) if isinstance(each, Tensor)}
            if made:
                node = self._operation(function, arguments, keywords, result)
                if any(id(each) in self.nodes for each in made.values()):  # in place, or ``out``
                    self.acts.add(node)
                    return result
                for i, each in made.items():
                    part = node if several is not result else self._call(getitem, [node, i])
                    self._stands_for(each, part)
        return result

    def add_launch(self, launch: Launch) -> None:
        """A node that launches Triton's compiled kernel with addresses, or interprets it."""
        operands: Sequence = [launch.arguments[name] for name in launch.kernel.arg_names]
        options: dict[str, Any] = {}
        if INTERPRETED.value:
            run = launch.kernel.run
            options = {"grid": launch.grid, "warmup": False, **launch.options}
            self.identities.add(launch.identity)
        else:
            try:
                kernel = launch.compile()
                launcher = kernel.run  # which loads it
            except Exception as error:
                raise RuntimeError(f"{launch.name} doesn't compile: {error}") from error
            self.kernels.append(kernel)
            self.identities.add(f"{launch.name} {kernel.hash}")
            first = [*(*launch.grid, 1, 1)[:3], self.stream]
            first += [kernel.function, kernel.packed_metadata, None, None, None]
            run, operands = _unwrapped(launcher, [*first, *operands])
        with DisableTorchFunction():
            operands = [self._argument(each, address=True) for each in operands]
        self.launches.append(self._call(run, operands, options, launch.name))
        self.acts.add(self.launches[-1])

    def captured(self, results: Sequence[Tensor | None]) -> CapturedCall:
        output = self.graph.output([self._argument(each) for each in results])
        self._drop_unused()
        self._share_workspace()
        self._hold(output.all_input_nodes)
        self._drop_unused()
        # Not a GraphModule: it keeps the graph, and torch.fx its source for ever.
        code = self.graph.python_code("self")
        scope = dict(code.globals)
        exec(compile(code.src, "<a captured call>", "exec"), scope)
        replay = MethodType(scope["forward"], self.constants)
        return CapturedCall(replay, code.src, self.kernels, self.identities, self.device.index)

    def _operation(self, function: Callable, arguments: tuple, keywords: dict, result: Any) -> Node:
        if function in _BUFFERS and result.is_contiguous():  # which needs no other tensor than one
            node = self._empty(result.shape, result.dtype)
            self.buffers[node] = result
            return node
        inputs = [self._argument(each) for each in arguments]
        if function.__name__ == "__get__":  # of a property, such as T
            return self._call(getattr, [*inputs, function.__self__.__name__])
        options = {name: self._argument(each) for name, each in keywords.items()}
        return self._call(function, inputs, options)

    def _empty(self, shape: Sequence[int], dtype: torch.dtype, name: str = "buffer") -> Node:
        few = shape if torch.Size(shape).numel() < 2 else ()
        like = torch.empty(few, dtype=dtype, device=self.device).expand(shape)
        made: Any = partial(torch.empty_like, like)
        made.__name__, made.__module__ = "buffer", __name__  # what torch.fx calls it by
        return self._call(made, [], name=name)

    def _call(
        self, function: Callable, inputs: Sequence, options: Any = None, name: str | None = None
    ) -> Node:
        is_method = isinstance(function, MethodDescriptorType)
        kind = ("call_method", function.__name__) if is_method else ("call_function", function)
        return self.graph.create_node(*kind, tuple(inputs), options, name)

    def _stands_for(self, value: Any, node: Node) -> Node:
        self.nodes[id(value)] = node
        self.alive.append(value)
        return node

    def _argument(self, value: Any, address: bool = False) -> Any:
        """The value's node or literal; ``address``: tensors give addresses, also in tuples."""
        if address and isinstance(value, Tensor):
            return self._address(value)
        if id(value) in self.nodes:
            return self.nodes[id(value)]
        if isinstance(value, TensorDescriptor):
            return self._call(_describing(value), [self._argument(value.base, address)])
        has_tensors = type(value) is list and any(isinstance(each, Tensor) for each in value)
        if has_tensors or type(value) is tuple:
            return type(value)([self._argument(each, address) for each in value])
        if type(value) in _LITERALS:
            return value
        name = f"constant_{len(self.alive)}"
        setattr(self.constants, name, value)
        return self._stands_for(value, self.graph.get_attr(name))

    def _address(self, tensor: Tensor) -> Node:
        """A view's address is its base's and an offset: views needn't be made for launches.

        To Triton's interpreter, the address of a tensor is the tensor.
        """
        base, offset = (tensor, 0) if INTERPRETED.value else (_base(tensor), _offset(tensor))
        node = self._argument(base)
        self.uses.setdefault(node, []).append(len(self.launches))
        if node not in self.addresses:
            self.addresses[node] = self._at(node)
        address = self.addresses[node]
        return self._call(add, [address, offset]) if offset else address

    def _at(self, node: Node) -> Node:
        function = _held if INTERPRETED.value else Tensor.data_ptr
        return self._call(function, [node], name=f"at_{node.name}")

    def _share_workspace(self) -> None:
        """Buffers that only launches use become parts of one allocation, the workspace."""
        lives = {
            node: (uses[0], uses[-1])
            for node, uses in self.uses.items()
            if node in self.buffers and node.users.keys() == {self.addresses[node]}
        }
        sizes = {node: self.buffers[node].untyped_storage().nbytes() for node in lives}
        offsets, size = _placed(lives, sizes)
        first = next(node for node in self.graph.nodes if node.op != "placeholder")
        with self.graph.inserting_before(first):
            workspace = self._empty([size], torch.uint8, "workspace")
            start = self._at(workspace)
        for node, offset in offsets.items():
            address = self.addresses[node]
            with self.graph.inserting_before(address):
                part = self._part(start, offset, self.buffers[node])
            address.replace_all_uses_with(part)
            self.uses.setdefault(workspace, []).extend(self.uses.pop(node))

    def _part(self, start: Node, offset: int, buffer: Tensor) -> Node:
        if not INTERPRETED.value:  # where the address of nothing is 0
            return self._call(add, [start if buffer.numel() else 0, offset])
        part = self._call(getitem, [start, slice(offset, offset + buffer.nbytes)])
        typed = self._call(Tensor.view, [part, buffer.dtype])
        return self._call(Tensor.view, [typed, tuple(buffer.shape)])

    def _hold(self, returned: Sequence[Node]) -> None:
        """Keep each new tensor alive until its last launch, because an address keeps none alive."""
        for node, uses in self.uses.items():
            if node.op.startswith("call") and node not in returned:
                with self.graph.inserting_after(self.launches[max(uses)]):
                    self.acts.add(self._call(_held, [node]))

    def _drop_unused(self) -> None:
        for node in reversed(self.graph.nodes):
            if not (node.users or node in self.acts or node.op in ("placeholder", "output")):
                vars(self.constants).pop(node.target, None)
                self.graph.erase_node(node)


def _unwrapped(launcher: Any, arguments: Sequence[Any]) -> tuple[Callable, Sequence[Any]]:
    """The function in C that Triton's launcher calls for these arguments, and its arguments.

    The launcher itself if it does more: scratch memory, a sanitizer.
    """
    fields = vars(launcher)
    scratch = [value for name, value in fields.items() if name.endswith("scratch_size")]
    if not callable(fields.get("launch")) or any(scratch) or fields.get("gsan_enabled"):
        return launcher.__call__, arguments
    handed: list[tuple] = []
    watched = copy(launcher)
    watched.launch = lambda *given: handed.append(given)
    watched(*arguments)
    return launcher.launch, handed[0]


def _placed(lives: dict, sizes: dict) -> tuple[dict, int]:
    """Offsets of buffers in the workspace, by first fit, and the size of the workspace, in bytes.

    ``lives``: the first and the last launch with each buffer, in the order of the first.
    """
    placed: list[tuple[int, int, int]] = []  # begin, end, last use
    offsets = {}
    for node, (first, last) in lives.items():
        offset = 0
        for begin, end, needed in sorted(placed):
            if needed >= first and offset < end and begin < offset + sizes[node]:
                offset = -(-end // _ALIGNED) * _ALIGNED
        offsets[node] = offset
        placed.append((offset, offset + sizes[node], last))
    return offsets, max((end for _, end, _ in placed), default=0)


def _base(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base


def _offset(tensor: Tensor) -> int:
    """Bytes from its base's address to its own."""
    start, its = (t.storage_offset() * t.element_size() for t in (_base(tensor), tensor))
    return its - start


def _held(tensor: Tensor) -> Tensor:
    """The tensor itself, which lives until this is called with it."""
    return tensor


class _Address(int):
    """The base of a tensor descriptor: Triton's launcher reads only its address."""

    data_ptr = int.__int__


class _Described(TensorDescriptor):
    """A tensor's descriptor, whose class has all fields but the base.

    They were checked when the call was resolved.
    """

    def __init__(self, base: Any) -> None:
        self.base = _Address(base) if type(base) is int else base


def _describing(like: TensorDescriptor) -> type[_Described]:
    # A tensor map is encoded from plain tuples in half the time of a torch.Size.
    fields = {
        name: tuple(value) if isinstance(value, (tuple, list)) else value
        for name, value in vars(like).items()
    }
    return type("Described", (_Described,), fields | {"base": None})

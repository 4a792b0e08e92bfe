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

The inputs are t0, t1 …, and ``at_…`` is a tensor's address.

* Buffers that only launches use are parts of one allocation, the workspace, at an offset each.  A
  part costs the host no call; a step of a layer takes 3 to 5 % less host time.
* ``buffer`` is ``torch.empty_like`` of a tensor with the buffer's shape, which has one element in
  memory (``expand``).  That takes half the time of ``torch.empty`` with shape and dtype.
* The generated function deletes a variable after its last use.  A launch gets only an address,
  which doesn't keep the tensor alive.  So ``held(tensor)``, which does nothing, follows the last
  launch that uses the tensor.

The capture runs the call once on stand-ins: tensors of the device "meta", with shape, strides and
dtype, but without memory.  So it computes nothing, and a failure changes no tensor.  If the call
reads the device or the address of a stand-in, it gets the real tensor's device, and an address with
the real one's alignment.  The recorder is a torch function mode, so it sees every operation,
including views.
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

_ALIGNED = 512  # bytes; torch also aligns its allocations on a GPU to this
_BUFFERS = (Tensor.new_empty, torch.empty_like)  # functions that make buffers
# torch.fx writes these values into the source.  Any other value is a constant of the replay.
_LITERALS = (type(None), bool, int, float, str, torch.dtype, torch.layout, torch.memory_format)


class CapturedCall(NamedTuple):
    replay: Callable[..., list[Tensor | None]]  # takes the stream, then the tensors
    source: str
    kernels: list[Any]  # Triton's compiled kernels, kept because a freed one unloads its code
    identities: Set[str]  # for each kernel, its name and the hash of its code
    device: int | None = None  # the number of the GPU


def capture_call(
    function: Callable[..., Sequence[Tensor | None]],
    tensors: Sequence[Tensor | None],
    settings: Sequence[Hashable],
) -> CapturedCall:
    """Capture ``function(tensors, *settings)`` for all tensors with the facts of these.

    The caller of a replay must keep the tensors alive until the replay returns.
    """
    # The caller's torch modes must not see stand-ins.  They see the operations of replays.
    # Inference mode is off, because its views have no ``_base``, which their address is computed
    # from.
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        recorder = _Recorder(tensors)
        with recorder, recording(recorder.add_launch):
            results = function(recorder.stand_ins, *settings)
        with DisableTorchFunction():
            return recorder.captured(results)


class _Recorder(TorchFunctionMode):
    """Makes a graph node of each operation on stand-ins, and gives their devices and addresses."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.device = next(tensor.device for tensor in tensors if tensor is not None)
        self.graph = Graph()
        self.nodes: dict[int, Node] = {}  # the id of a value -> the node that computes it
        self.alive: list[Any] = []  # these values: while they live, Python reuses no id
        self.constants = SimpleNamespace()  # the generated function's ``self``
        self.effects: set[Node] = set()  # nodes with side effects: launches, writes in place
        self.addresses: dict[Node, Node] = {}  # a tensor's node -> the node of its address
        self.modulo_16: dict[Node, int] = {}  # the inputs' addresses modulo 16
        self.launches: list[Node] = []
        self.buffers: dict[Node, Tensor] = {}
        self.last_use: dict[Node, int] = {}  # a tensor's node -> last launch that gets its address
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
        # Every torch function, method and property of a tensor comes here.
        keywords = keywords or {}
        if getattr(function, "__name__", "") == "data_ptr" and arguments[0].is_meta:
            # Callers use only (address % 16) and (address == 0), so 2²⁰ can stand for any base.
            base = self.nodes[id(_base(arguments[0]))]
            return 2**20 + self.modulo_16.get(base, 0) + _offset(arguments[0])
        if getattr(function, "__self__", None) is Tensor.device:  # tensor.device is read
            return self.device
        out = keywords.get("out")  # if given, it is the result, and a stand-in needs no values
        with DisableTorchFunction():  # turns off this mode and the caller's modes
            result = function(*arguments, **keywords) if out is None else out
            results = result if isinstance(result, tuple) else (result,)
            tensors = {i: each for i, each in enumerate(results) if isinstance(each, Tensor)}
            # A result without a tensor (a shape, a stride) is a fact, the same in every replay.
            if tensors:
                node = self._operation(function, arguments, keywords, result)
                if any(id(each) in self.nodes for each in tensors.values()):  # in place, or out=
                    self.effects.add(node)
                    return result
                # The node of a tuple gives its tensors by getitem.
                for i, each in tensors.items():
                    part = node if results is not result else self._call(getitem, [node, i])
                    self._stands_for(each, part)
        return result

    def add_launch(self, launch: Launch) -> None:
        """Add a node that launches Triton's compiled kernel with addresses, or interprets it."""
        operands: Sequence = [launch.arguments[name] for name in launch.kernel.arg_names]
        options: dict[str, Any] = {}
        if INTERPRETED.value:
            run = launch.kernel.run
            options = {"grid": launch.grid, "warmup": False, **launch.options}
            self.identities.add(launch.identity)
        else:
            try:
                kernel = launch.compile()
                launcher = kernel.run  # reading this property also loads the code
            except Exception as error:
                raise RuntimeError(f"{launch.name} doesn't compile: {error}") from error
            self.kernels.append(kernel)
            self.identities.add(f"{launch.name} {kernel.hash}")
            # The first arguments of Triton's launcher: grid, stream, code, and no profiler's hooks.
            before = [*(*launch.grid, 1, 1)[:3], self.stream]
            before += [kernel.function, kernel.packed_metadata, None, None, None]
            run, operands = _unwrapped(launcher, [*before, *operands])
        with DisableTorchFunction():
            operands = [self._argument(each, address=True) for each in operands]
        self.launches.append(self._call(run, operands, options, launch.name))
        self.effects.add(self.launches[-1])

    def captured(self, results: Sequence[Tensor | None]) -> CapturedCall:
        """Compile the graph to a function that returns these results."""
        output = self.graph.output([self._argument(each) for each in results])
        self._drop_unused()
        self._share_workspace()
        self._hold(output.all_input_nodes)
        self._drop_unused()
        # Not a GraphModule: it would keep the graph, and torch.fx would keep its source forever.
        code = self.graph.python_code("self")
        scope = dict(code.globals)
        exec(compile(code.src, "<a captured call>", "exec"), scope)
        replay = MethodType(scope["forward"], self.constants)
        return CapturedCall(replay, code.src, self.kernels, self.identities, self.device.index)

    def _operation(self, function: Callable, arguments: tuple, keywords: dict, result: Any) -> Node:
        """Add a node that calls a torch function, or one that allocates a contiguous buffer."""
        # A contiguous buffer depends on no other tensor, so its node has no inputs.
        if function in _BUFFERS and result.is_contiguous():
            node = self._buffer(result.shape, result.dtype)
            self.buffers[node] = result
            return node
        inputs = [self._argument(each) for each in arguments]
        if function.__name__ == "__get__":  # of a property, such as T
            return self._call(getattr, [*inputs, function.__self__.__name__])
        options = {name: self._argument(each) for name, each in keywords.items()}
        return self._call(function, inputs, options)

    def _buffer(self, shape: Sequence[int], dtype: torch.dtype, name: str = "buffer") -> Node:
        # At most one element in memory: shape () if it can be expanded, or its own shape.
        at_most_one = shape if torch.Size(shape).numel() < 2 else ()
        like = torch.empty(at_most_one, dtype=dtype, device=self.device)
        allocate: Any = partial(torch.empty_like, like.expand(shape))
        # Its name in torch.fx's source.
        allocate.__name__, allocate.__module__ = "buffer", __name__
        return self._call(allocate, [], name=name)

    def _call(
        self, function: Callable, inputs: Sequence, options: Any = None, name: str | None = None
    ) -> Node:
        # torch.fx writes a C method as tensor.name(…), and any other function as name(…).
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
        """A node for the tensor's address: its base's address plus an offset.

        A view is never created in a replay if only launches use it.  Triton's interpreter takes the
        tensor itself in place of an address.
        """
        base, offset = (tensor, 0) if INTERPRETED.value else (_base(tensor), _offset(tensor))
        node = self._argument(base)
        self.last_use[node] = len(self.launches)
        if node not in self.addresses:
            self.addresses[node] = self._at(node)
        address = self.addresses[node]
        return self._call(add, [address, offset]) if offset else address

    def _at(self, node: Node) -> Node:
        function = _held if INTERPRETED.value else Tensor.data_ptr
        return self._call(function, [node], name=f"at_{node.name}")

    def _share_workspace(self) -> None:
        """Make the buffers that only launches use parts of one allocation, the workspace."""
        size, offsets = 0, {}
        for node in self.last_use:
            if node in self.buffers and node.users.keys() == {self.addresses[node]}:
                offsets[node] = size if self.buffers[node].nbytes else 0  # an empty one: address 0
                size += -(-self.buffers[node].nbytes // _ALIGNED) * _ALIGNED
        first = next(node for node in self.graph.nodes if node.op != "placeholder")
        with self.graph.inserting_before(first):
            workspace = self._buffer([size], torch.uint8, "workspace")
            start = self._at(workspace)
        for node, offset in offsets.items():
            address = self.addresses[node]
            with self.graph.inserting_before(address):
                address.replace_all_uses_with(self._part(start, offset, self.buffers[node]))
            self.last_use[workspace] = max(self.last_use.get(workspace, 0), self.last_use.pop(node))

    def _part(self, start: Node, offset: int, buffer: Tensor) -> Node:
        if not INTERPRETED.value:
            return self._call(add, [start if buffer.numel() else 0, offset])
        part = self._call(getitem, [start, slice(offset, offset + buffer.nbytes)])
        typed = self._call(Tensor.view, [part, buffer.dtype])
        return self._call(Tensor.view, [typed, tuple(buffer.shape)])

    def _hold(self, returned: Sequence[Node]) -> None:
        """Add ``held(tensor)`` after the last launch with each new tensor, to keep it alive."""
        for node, last in self.last_use.items():
            if node.op.startswith("call") and node not in returned:
                with self.graph.inserting_after(self.launches[last]):
                    self.effects.add(self._call(_held, [node]))

    def _drop_unused(self) -> None:
        """Erase nodes without users and without effects, such as views that only launches use."""
        for node in reversed(self.graph.nodes):
            if not (node.users or node in self.effects or node.op in ("placeholder", "output")):
                vars(self.constants).pop(node.target, None)
                self.graph.erase_node(node)


def _unwrapped(launcher: Any, arguments: Sequence[Any]) -> tuple[Callable, Sequence[Any]]:
    """(C function, arguments) that Triton's launcher would call for these arguments.

    A direct call saves host time.  If the launcher does more than this call (scratch memory, a
    sanitizer), returns the launcher and its arguments.
    """
    fields = vars(launcher)
    scratch = [value for name, value in fields.items() if name.endswith("scratch_size")]
    if not callable(fields.get("launch")) or any(scratch) or fields.get("gsan_enabled"):
        return launcher.__call__, arguments
    # Triton's launcher computes the C function's arguments from its own: it adds flags and the
    # types of arguments.  So run a copy whose C function records its arguments and returns.
    recorded: list[tuple] = []
    spy = copy(launcher)
    spy.launch = lambda *c_arguments: recorded.append(c_arguments)
    spy(*arguments)
    return launcher.launch, recorded[0]


def _base(tensor: Tensor) -> Tensor:
    """The tensor whose memory this view uses; the tensor itself if it is no view."""
    return tensor if tensor._base is None else tensor._base


def _offset(tensor: Tensor) -> int:
    """address of the tensor - address of its base, in bytes."""
    base, own = (t.storage_offset() * t.element_size() for t in (_base(tensor), tensor))
    return own - base


def _held(tensor: Tensor) -> Tensor:
    """Returns the tensor.  A call after a launch keeps the tensor alive until after the launch."""
    return tensor


class _Address(int):
    """An address with ``data_ptr()``.  Triton reads nothing else of a tensor descriptor's base."""

    data_ptr = int.__int__


class _Described(TensorDescriptor):
    """A tensor descriptor for replays, with only its base as an instance attribute.

    The other fields are attributes of a subclass (:func:`_describing`).  Their checks passed in the
    capture, so a replay skips them.
    """

    def __init__(self, base: Any) -> None:
        self.base = _Address(base) if type(base) is int else base


def _describing(like: TensorDescriptor) -> type[_Described]:
    """A class of descriptors that differ from ``like`` only in their base."""
    # Triton encodes a descriptor from plain tuples in half the time that a torch.Size takes.
    fields = {
        name: tuple(value) if isinstance(value, (tuple, list)) else value
        for name, value in vars(like).items()
    }
    return type("Described", (_Described,), fields | {"base": None})

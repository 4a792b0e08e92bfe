"""A call as a script: the torch operations and the launches that it comes to, line by line.

The call runs once on stand-ins, tensors without data, and what it asks for is written down as a
function of Python.  That of h = x lora_aᵀ, say, whose columns are summed in two halves:

    def replay(stream, t0, t1):
        room = t0.new_empty(65536, dtype=uint8_9)
        at_room = room.data_ptr()
        v2 = t0.new_empty(512, 16)
        at_v3 = at_room + 0
        at_t0 = t0.data_ptr()
        at_t1 = t1.data_ptr()
        at_v2 = v2.data_ptr()
        launch_7(8, 2, 1, stream, …, (at_t0, (at_t1,), (at_v2,), (at_v3,), None, 512, 2048, …))
        launch_8(8, 1, 1, stream, …, ((at_v3,), (at_v2,), 8192, …))
        return [v2]

A tensor is t0, t1 … if it came, v2 … if it was made.  Buffers of which only launches know lie in
one allocation, the room, and where one lay that is needed no more the next one lies.
"""

import math
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from threading import Lock
from types import CellType, FunctionType, MethodDescriptorType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch._C import DisableTorchFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import INTERPRETED
from .launch import Launch, recording

_NAME = re.compile(r"\b(?:at_)?([tv]\d+(?:_\d+)?)\b")  # of a tensor, or of its address
_BUFFERS = (Tensor.new_empty, torch.empty_like)  # what makes them
_ALIGNED = 512  # bytes, as torch's allocations on a GPU
_encoders_are_ours = Lock()  # one thread's at a time, or another's would be put back


class Script(NamedTuple):
    replay: Callable[..., list[Tensor | None]]  # of the stream, and of the tensors
    source: str
    kernels: list[Any]  # Triton's, which unload their code when they go
    identities: frozenset[str]  # each kernel's name, and the hash of its code


def script_of(
    function: Callable[..., Sequence[Tensor | None]],
    tensors: Sequence[Tensor | None],
    settings: Sequence[Hashable],
) -> Script:
    """What ``function(tensors, *settings)`` does, for all tensors like these."""
    # Modes of the caller's see what is replayed, and no stand-in.  A view that inference mode made,
    # or of a tensor that it made, doesn't know its base, and so neither its address.
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        writer = _Writer(tensors)
        with writer, recording(writer.add_launch):
            results = function(writer.stand_ins, *settings)
    return writer.script(results)


class _Line(NamedTuple):
    name: str  # of what it makes; "" if it acts
    code: str

    def __str__(self) -> str:
        return f"{self.name} = {self.code}" if self.name else self.code


class _Code(str):
    """Code in the place of the value that a replay has there."""


class _Addressed:
    """The base of a tensor descriptor, of which Triton's launcher asks the address alone."""

    def __init__(self, address: _Code) -> None:
        self.address = address

    def data_ptr(self) -> _Code:
        return self.address


class _Writer(TorchFunctionMode):
    """Writes down what happens to stand-ins, and answers for their device and their address."""

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.device = next(tensor.device for tensor in tensors if tensor is not None)
        self.lines: list[_Line] = []
        self.constants: dict[str, Any] = {}
        self.names: dict[int, str] = {}  # of tensors and constants, by id
        self.alive: list[Any] = []  # so that an id stays one object's
        self.buffers: dict[str, Tensor] = {}
        self.kernels: list[Any] = []
        self.identities: set[str] = set()
        self.addresses: dict[str, int] = {}  # modulo 16, of what came
        self.stand_ins: list[Tensor | None] = [None] * len(tensors)
        for i, tensor in enumerate(tensors):
            if tensor is not None:
                with DisableTorchFunction():
                    stand_in = torch.empty_strided(
                        tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
                    )
                self.stand_ins[i] = stand_in
                self.addresses[self._call(stand_in, f"t{i}")] = tensor.data_ptr() & 15

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        name = getattr(function, "__name__", "")
        if name == "data_ptr":
            # Only what it is modulo 16 is looked at, and that it isn't 0, which is no address.
            base = self._name(_base(arguments[0]))
            return 2**20 + self.addresses.get(base, 0) + _offset(arguments[0])
        if name == "__get__" and function.__self__ is Tensor.device:
            return self.device
        out = keywords.get("out")  # then it is the result, and nothing need be computed
        with DisableTorchFunction():  # and with it the caller's modes
            result = function(*arguments, **keywords) if out is None else out
        if name == "__get__" and function.__self__ is Tensor._base:
            return result
        if isinstance(result, Tensor) or (
            isinstance(result, tuple) and any(isinstance(each, Tensor) for each in result)
        ):
            self._add_operation(function, arguments, keywords, result)
        return result

    def add_launch(self, launch: Launch) -> None:
        """A line that launches Triton's compiled kernel with addresses, or interprets it."""
        operands = [launch.arguments[name] for name in launch.kernel.arg_names]
        if INTERPRETED.value:
            run: Callable = partial(launch.kernel[launch.grid], **launch.options)
            arguments: Sequence = [self._code(operand, address=True) for operand in operands]
            self.identities.add(launch.identity)
        else:
            try:
                kernel = launch.compile()
                launcher = kernel.run  # which loads it
            except Exception as error:
                raise RuntimeError(f"{launch.name} doesn't compile: {error}") from error
            self.kernels.append(kernel)
            self.identities.add(f"{launch.name} {kernel.hash}")
            arguments = [
                _describe(operand.__dict__, _Addressed(self._address(operand.base)))
                if isinstance(operand, TensorDescriptor)
                else self._code(operand, address=True)
                for operand in operands
            ]
            first = [*(*launch.grid, 1, 1)[:3], _Code("stream")]
            first += [kernel.function, kernel.packed_metadata, None, None, None]
            run, arguments = self._bare(launcher, [*first, *arguments])
        self.lines.append(_Line("", f"{self._calling(run, arguments)}  # {launch.name}"))

    def script(self, results: Sequence[Tensor | None]) -> Script:
        returned = _Line("", f"return [{', '.join(map(self._code, results))}]")
        lines = self._in_one_room(_needed([*self.lines, returned]))
        places = [f"t{i}" for i in range(len(self.stand_ins))]
        head = f"def replay({', '.join(['stream', *places])}):"
        source = "\n    ".join([head, *map(str, _letting_go(_needed(lines)))])
        scope = {word: self.constants[word] for word in _words(source) & self.constants.keys()}
        exec(compile(source, "<a kept call>", "exec"), scope)
        return Script(scope["replay"], source, self.kernels, frozenset(self.identities))

    def _add_operation(
        self, function: Callable, arguments: tuple, keywords: dict, result: Any
    ) -> None:
        tensors = (result,) if isinstance(result, Tensor) else result
        is_buffer = function in _BUFFERS and result.is_contiguous()
        if is_buffer:  # whose line needs no other
            code = self._empty(result.shape, result.dtype)
        else:
            code = self._calling(function, arguments, keywords)
        if any(id(tensor) in self.names for tensor in tensors):  # in place, or into ``out``
            self.lines.append(_Line("", code))
            return
        name = f"v{len(self.alive)}"  # so that it is new
        self.lines.append(_Line(name, code))
        if isinstance(result, Tensor):
            self._call(result, name)
            if is_buffer:
                self.buffers[name] = result
            return
        for i, tensor in enumerate(tensors):
            self.lines.append(_Line(self._call(tensor, f"{name}_{i}"), f"{name}[{i}]"))

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> str:
        here, like = next((i, t) for i, t in enumerate(self.stand_ins) if t is not None)
        of_dtype = "" if dtype == like.dtype else f", dtype={self._name(dtype)}"
        return f"t{here}.new_empty(({', '.join(map(str, shape))},){of_dtype})"

    def _calling(self, function: Callable, arguments: Sequence, keywords: Mapping = {}) -> str:
        codes: list[str] = [self._code(argument) for argument in arguments]
        codes += [f"{name}={self._code(value)}" for name, value in keywords.items()]
        if isinstance(function, MethodDescriptorType):
            return f"{codes[0]}.{function.__name__}({', '.join(codes[1:])})"
        return f"{self._name(function)}({', '.join(codes)})"

    def _code(self, value: Any, address: bool = False) -> _Code:
        """The code for this value; ``address``: for a tensor's address, also inside of tuples.

        What is neither written as a literal nor made in each replay is a constant with a name.
        """
        if isinstance(value, _Code):
            return value
        if isinstance(value, Tensor) and address:
            return self._address(value)
        if isinstance(value, TensorDescriptor):
            describe = partial(_describe, value.__dict__ | {"base": None})
            return _Code(self._calling(describe, [value.base]))
        if isinstance(value, _Addressed):
            return value.data_ptr()
        if type(value) in (tuple, list) and (_is_literal(value) or _is_made(value)):
            codes = "".join([f"{self._code(each, address)}, " for each in value])
            return _Code(f"({codes})" if type(value) is tuple else f"[{codes}]")
        return _Code(repr(value) if _is_literal(value) else self._name(value))

    def _address(self, tensor: Tensor) -> _Code:
        """A view's address is its base's and an offset: views needn't be made for launches.

        To Triton's interpreter, the address of a tensor is the tensor.
        """
        if INTERPRETED.value:
            name = self._name(tensor)
            line, offset = _Line(f"at_{name}", name), 0
        else:
            name = self._name(_base(tensor))
            line, offset = _Line(f"at_{name}", f"{name}.data_ptr()"), _offset(tensor)
        if line not in self.lines:
            self.lines.append(line)
        return _Code(f"{line.name} + {offset}" if offset else line.name)

    def _name(self, value: Any) -> str:
        """The name of a tensor that came or was made; of anything else, as a constant."""
        name = self.names.get(id(value))
        if name is None:
            kind = getattr(value, "__name__", type(value).__name__).strip("_")
            name = self._call(value, f"{kind if kind.isidentifier() else 'it'}_{len(self.alive)}")
            self.constants[name] = value
        return name

    def _call(self, value: Any, name: str) -> str:
        self.names[id(value)] = name
        self.alive.append(value)
        return name

    def _bare(self, launcher: Any, arguments: Sequence[Any]) -> tuple[Callable, Sequence[Any]]:
        """The function in C behind Triton's launcher, and what it gets for these arguments.

        The launcher itself, where there is more to it: scratch memory, a sanitizer.
        """
        fields = vars(launcher)
        scratch = [value for name, value in fields.items() if name.endswith("scratch_size")]
        if not callable(fields.get("launch")) or any(scratch) or fields.get("gsan_enabled"):
            return launcher, arguments
        handed: list[tuple] = []
        watched, launch = copy(launcher), fields["launch"]
        watched.launch = lambda *found: handed.append(found)
        if "launcher" in getattr(getattr(launch, "__code__", None), "co_freevars", ()):
            # What encodes tensor maps for the function in C, which it knows by this name.
            cells = dict(zip(launch.__code__.co_freevars, launch.__closure__, strict=True))
            launch = cells["launcher"].cell_contents
            cells["launcher"] = CellType(watched.launch)
            code, scope = fields["launch"].__code__, fields["launch"].__globals__
            watched.launch = FunctionType(code, scope, closure=tuple(cells.values()))
        with self._maps_written_down():
            watched(*arguments)
        return launch, handed[0]

    @contextmanager
    def _maps_written_down(self) -> Iterator[None]:
        """Tensor maps of stand-ins become the code that encodes them: they hold an address."""

        def written(encode: Callable, address: Any, *settings: Any) -> Any:
            if isinstance(address, _Code):
                return _Code(self._calling(encode, [address, *settings]))
            return encode(address, *settings)  # another thread's launch

        utils = triton.runtime.driver.active.utils
        with _encoders_are_ours:
            encoders = {
                name: value for name, value in vars(utils).items() if name.startswith("fill_tma")
            }
            try:
                for name, encode in encoders.items():
                    setattr(utils, name, partial(written, encode))
                yield
            finally:
                for name, encode in encoders.items():
                    setattr(utils, name, encode)

    def _in_one_room(self, lines: Sequence[_Line]) -> list[_Line]:
        """The lines, with parts of one buffer in the place of those that launches alone know."""
        offsets, size = _places(lines, self.buffers)
        found = [
            _Line("room", self._empty((size,), torch.uint8)),
            _Line("at_room", "room.data_ptr()"),
        ]
        for line in lines:
            name = line.name.removeprefix("at_")
            if name not in offsets:
                found.append(line)
            elif name != line.name:
                found.append(_Line(line.name, self._part(self.buffers[name], offsets[name])))
        return found

    def _part(self, buffer: Tensor, offset: int) -> str:
        """The code for the address of this part of the room."""
        if INTERPRETED.value:
            end = offset + buffer.untyped_storage().nbytes()
            part = partial(_part, slice(offset, end), buffer.dtype, buffer.shape)
            return f"{self._name(part)}(room)"
        return f"at_room + {offset}" if buffer.numel() else "0"


def _places(lines: Sequence[_Line], buffers: Mapping[str, Tensor]) -> tuple[dict[str, int], int]:
    """Where in one room the buffers lie of which lines need the address alone; and its size.

    Each has the first place that is free from its first use to its last.  Lines of code say
    ``at_v2`` where they need the address alone.
    """
    lives: dict[str, tuple[int, int]] = {}  # in the order of first uses
    whole: set[str] = set()
    for i, line in enumerate(lines):
        for found in _NAME.finditer(line.code):
            name = found[1]
            if found[0] != name:
                lives[name] = (lives.get(name, (i, i))[0], i)
            elif line.name != f"at_{name}":
                whole.add(name)
    placed: list[tuple[int, int, int]] = []  # begin, end, last use
    offsets: dict[str, int] = {}
    for name, (first, last) in lives.items():
        if name not in buffers or name in whole:
            continue
        size, offset = buffers[name].untyped_storage().nbytes(), 0
        for begin, end, needed in sorted(placed):
            if needed >= first and offset < end and begin < offset + size:
                offset = -(-end // _ALIGNED) * _ALIGNED
        offsets[name] = offset
        placed.append((offset, offset + size, last))
    return offsets, max((end for _, end, _ in placed), default=0)


def _part(where: slice, dtype: torch.dtype, shape: Sequence[int], room: Tensor) -> Tensor:
    return room[where].view(dtype).view(shape)


def _needed(lines: Sequence[_Line]) -> list[_Line]:
    """Without those that make what no line needs."""
    needed: set[str] = set()
    kept = []
    for line in reversed(lines):
        if not line.name or line.name in needed:
            needed |= _words(line.code)
            kept.append(line)
    return kept[::-1]


def _letting_go(lines: Sequence[_Line]) -> list[_Line]:
    """With lines that let go of a tensor behind the last that needs it, or its address."""
    last = {name: i for i, line in enumerate(lines) for name in _NAME.findall(line.code)}
    made = {line.name for line in lines}
    found = []
    for i, line in enumerate(lines):
        done = [name for name, end in last.items() if end == i and name in made]
        found.append(line)
        if done and line is not lines[-1]:
            found.append(_Line("", f"del {', '.join(done)}"))
    return found


def _is_literal(value: Any) -> bool:
    if type(value) in (tuple, list):
        return all(map(_is_literal, value))
    return value is None or (type(value) in (bool, int, float) and math.isfinite(value))


def _is_made(value: Any) -> bool:
    """Whether it is, or has in it, what each replay has of its own."""
    if type(value) in (tuple, list):
        return any(map(_is_made, value))
    return isinstance(value, (Tensor, TensorDescriptor, _Code, _Addressed))


def _words(code: str) -> set[str]:
    return set(re.findall(r"\w+", code))


def _base(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base


def _offset(tensor: Tensor) -> int:
    """Bytes from its base's address to its own."""
    elements = tensor.storage_offset() - _base(tensor).storage_offset()
    return elements * tensor.element_size()


def _describe(fields: dict[str, Any], base: Any) -> TensorDescriptor:
    """The descriptor of these fields for another tensor; checked when the call was resolved."""
    descriptor = object.__new__(TensorDescriptor)
    descriptor.__dict__.update(fields)
    descriptor.base = base
    return descriptor

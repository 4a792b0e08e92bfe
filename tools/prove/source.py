"""Runs a kernel's Python source with unknown integers.

The source is parsed, and run with ``language`` in place of ``triton.language``.  Each ``if`` on an
unknown condition runs the kernel once more.  A loop's body runs once, as its step k for an unknown
k; a variable that grows by the same number in each step is known there, any other that the body
carries over isn't.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import z3

from . import language, values
from .engine import FailedError, Proof
from .values import Bool, Data, Descriptor, UnsupportedError, as_int

# Device functions whose numbers no address depends on.
OPAQUE: dict[str, Callable] = {
    "dot": lambda a, b, total, *_: total,
    "cast": lambda tile, dtype, *_: Data(getattr(tile, "shape", ()), dtype),
    "known_multiple": lambda number, _: number,
    "hadamard_matrix": lambda dtype: Data((64, 64), dtype),
    "rotate_tile": lambda tile, *_: tile,
    "keep_tile": lambda *arguments: Data(arguments[-2:]),
    "looked_up": lambda table, code: code,
    "_logits": lambda z, *_: (z, z),
    "scaled": lambda code, _: code,
    "float8_of": lambda bits: bits,
    "activated": lambda gate, _: (gate, gate),
    "add_kept": lambda total, *_: total,
}
_LOOPS = {"loop": language.loop, "at_begin": language.at_begin, "at_end": language.at_end,
          "step_number": language.step_number}  # fmt: skip


@dataclass
class Edit:
    """A change of a function's source: a text, or the condition of a mask that is dropped."""

    function: str
    old: str = ""
    new: str = ""
    mask: int = 0


class Source:
    """The functions of a kernel, as they run here."""

    def __init__(self, contracts: dict[str, Callable], edit: Edit | None = None) -> None:
        self.known, self.edit = OPAQUE | contracts, edit
        self.made: dict[Any, Callable] = {}

    def function(self, jitted: Any) -> Callable:
        if jitted.fn not in self.made:
            self.made[jitted.fn] = self._made(jitted.fn)
        return self.made[jitted.fn]

    def _made(self, plain: Any) -> Callable:
        source, name = textwrap.dedent(inspect.getsource(plain)), plain.__name__
        edit = self.edit if self.edit and self.edit.function == name else Edit(name, mask=-1)
        if edit.old:
            assert source.count(edit.old) == 1, f"{name} has {source.count(edit.old)} {edit.old!r}"
            source = source.replace(edit.old, edit.new)
        tree = ast.parse(source)
        if not edit.old and edit.mask >= 0:
            tree = _WithoutMask(mask_parts(tree)[edit.mask]).visit(tree)
        (definition,) = tree.body
        definition.decorator_list = []
        for argument in definition.args.args:
            argument.annotation = None
        tree = ast.fix_missing_locations(_Loops().visit(tree))
        ast.increment_lineno(tree, inspect.getsourcelines(plain)[1] - 1)
        scope: dict[str, Any] = {
            **{used: self._later(each) for used, each in plain.__globals__.items()}, **self.known,
            **_LOOPS, "tl": language, "min": values.smallest, "max": values.largest,
            "INTERPRETED": False, "always": Bool(z3.BoolVal(True)),
        }  # fmt: skip
        exec(compile(tree, f"<kernel {name}>", "exec"), scope)
        return _with_shape(scope[name]) if name == "load_tile" else scope[name]

    def _later(self, value: Any) -> Any:
        """The function in place of a jitted one, made at its first call."""
        if not hasattr(value, "fn"):
            return value
        return lambda *arguments, **named: self.function(value)(*arguments, **named)


def _with_shape(load_tile: Callable) -> Callable:
    """``load_tile`` whose result has the shape that the call states, as a descriptor's box must."""
    signature = inspect.signature(load_tile)

    def called(of: Any, *listed: Any, **named: Any) -> Data:
        arguments = signature.bind(of, *listed, **named).arguments
        shape = arguments["BLOCK_ROWS"], arguments["BLOCK_COLUMNS"]
        if isinstance(of, Descriptor):
            box = [as_int(n).poly for n in of.box[-2:]]
            if box != [as_int(n).poly for n in shape]:
                values.proof.failed(f"load {of.operand.name}", "the box isn't the tile")
        return Data(shape, load_tile(**arguments).dtype)

    return called


class _Loops(ast.NodeTransformer):
    """Rewrites loops: each names its variable, and says which variables it carries."""

    def visit_For(self, node: ast.For) -> Any:
        self.generic_visit(node)
        called = ast.unparse(node.iter.func) if isinstance(node.iter, ast.Call) else ""
        if called not in ("range", "tl.range"):
            return node
        target = ast.unparse(node.target)
        bounds = ", ".join(map(ast.unparse, node.iter.args))
        node.iter = ast.parse(f"loop({target!r}, {bounds})", mode="eval").body
        inner = [n for statement in node.body for n in ast.walk(statement)]
        stored = [n.id for n in inner if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        before = {n: f"{n} = at_begin({n!r}, locals())" for n in {*stored} - {target}}
        after = [f"{n} = at_end({n!r}, locals())" for n in before]
        for statement in node.body:
            if isinstance(statement, ast.AugAssign) and isinstance(statement.op, ast.Add):
                name, by = ast.unparse(statement.target), ast.unparse(statement.value)
                used = {n.id for n in ast.walk(statement.value) if isinstance(n, ast.Name)}
                if stored.count(name) == 1 and not used & {*stored}:  # it grows by ``by``
                    before[name] = f"{name} += ({by}) * step_number()"
        node.body = ast.parse("\n".join(before.values())).body + node.body
        return [node, *ast.parse("\n".join(after)).body]


def mask_parts(tree: ast.AST) -> list[ast.expr]:
    """The conditions of all masks, each with others in a conjunction or by itself."""
    nodes = [*ast.walk(tree)]
    masks = [n.value for n in nodes if isinstance(n, ast.keyword) and n.arg == "mask"]
    names = {mask.id for mask in masks if isinstance(mask, ast.Name)}
    assigned = [n for n in nodes if isinstance(n, ast.Assign)]
    masks += [n.value for n in assigned if ast.unparse(n.targets[0]) in names]
    parts = [[m.left, m.right] if isinstance(m, ast.BinOp) else [m] for m in masks]
    return [part for each in parts for part in each if not isinstance(part, ast.Name)]


class _WithoutMask(ast.NodeTransformer):
    def __init__(self, part: ast.expr) -> None:
        self.part = part

    def visit(self, node: ast.AST) -> ast.AST:
        return ast.Name("always", ast.Load()) if node is self.part else super().visit(node)


def run(proof: Proof, source: Source, kernel: Any, setup: Callable[[Proof], tuple]) -> Proof:
    """Run a kernel on all its paths.

    ``setup`` states facts, and returns the arguments and the outputs.  On a path where a launcher's
    assertion fails, there is no launch.
    """
    function = source.function(kernel)
    for _ in proof.paths():
        try:
            arguments, outputs = setup(proof)
        except AssertionError:
            continue
        proof.enter_kernel(outputs)
        try:
            try:
                function(**arguments)
            except UnsupportedError as error:
                proof.failed("the source", str(error))
        except FailedError:
            return proof
    if not proof.launches:
        proof.failed("the launcher", "its assertions fail for all sizes")
    for site in sorted(proof.sites - proof.reached):
        proof.failed(site, "it never happens")
    return proof

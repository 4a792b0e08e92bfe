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
from typing import Any

import z3

from . import contracts, language, values
from .engine import Proof
from .values import Bool, Data, Descriptor, as_int

# Device functions that aren't run: their contracts, or numbers that no address depends on.
KNOWN: dict[str, Callable] = contracts.CONTRACTS | {
    "dot": lambda a, b, total, *_: total,
    "cast": lambda tile, *_: Data(getattr(tile, "shape", ())),
    "known_multiple": lambda number, _: number,
    "hadamard_matrix": lambda _: Data((64, 64)),
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


def text_of(plain: Any) -> str:
    return textwrap.dedent(inspect.getsource(plain))


class Source:
    """The functions of a kernel, as they run here.  ``edits``: the changed sources of some."""

    def __init__(self, edits: dict[str, str] | None = None) -> None:
        self.edits = edits or {}
        self.made: dict[Any, Callable] = {}

    def function(self, jitted: Any) -> Callable:
        if jitted.fn not in self.made:
            self.made[jitted.fn] = self._made(jitted.fn)
        return self.made[jitted.fn]

    def _made(self, plain: Any) -> Callable:
        name = plain.__name__
        tree = ast.parse(self.edits.get(name) or text_of(plain))
        (definition,) = tree.body
        definition.decorator_list = []
        for argument in definition.args.args:
            argument.annotation = None
        tree = ast.fix_missing_locations(_Loops().visit(tree))
        ast.increment_lineno(tree, inspect.getsourcelines(plain)[1] - 1)
        scope: dict[str, Any] = {
            **{used: self._later(each) for used, each in plain.__globals__.items()}, **KNOWN,
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
        load_tile(**arguments)
        return Data(shape)

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


def run(proof: Proof, function: Callable, setup: Callable[[], tuple]) -> None:
    """Run a kernel on all its paths.

    ``setup`` states facts, and returns the arguments and the outputs.  On a path where a launcher's
    assertion fails, there is no launch.
    """
    for _ in proof.paths():
        try:
            arguments, outputs = setup()
        except AssertionError:
            continue
        proof.enter_kernel(outputs)
        function(**arguments)
    if not proof.launches:
        proof.failed("the launcher", "its assertions fail for all sizes")
    for site in sorted(proof.sites - proof.reached):
        proof.failed(site, "it never happens")

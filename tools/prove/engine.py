"""Runs a kernel's Python source with unknown integers, and collects what has to be proved.

A function's source is parsed, and run with a substitute for ``triton.language``.  Each ``if`` on an
unknown condition runs the kernel once more.  A loop's body runs once, as its step k for an unknown
k; a variable that grows by the same number in each step is known there, any other that the body
carries over isn't.  Each lane of ``tl.arange`` is one unknown.
"""

import ast
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import z3

from . import values
from .numbers import DOT, Solver, names_of
from .values import (
    Bool,
    Data,
    Descriptor,
    Gone,
    Int,
    Operand,
    Pointer,
    Tally,
    UnsupportedError,
    as_int,
)


class FailedError(Exception):
    """A failure was found, and one is enough."""


GIVEN, CONDITION = "given", "condition"


@dataclass
class Fact:
    """``kind``: GIVEN follows from the definition of an unknown; a CONDITION decides whether the
    program, lane or step exists, or takes this branch."""

    claim: z3.BoolRef
    kind: str = GIVEN
    of: str = ""  # the lane whose range this is


@dataclass
class Relation:
    """Integers that a function or a tensor gives for other integers: equal ones for equal ones."""

    name: str
    arguments: list[z3.ArithRef]
    results: list[z3.ArithRef]
    laws: Callable[["Relation", "Relation"], list[z3.BoolRef]] | None = None

    def renamed(self, pairs: list) -> "Relation":
        new = [[z3.substitute(n, *pairs) for n in s] for s in (self.arguments, self.results)]
        return Relation(self.name, *new, self.laws)

    def with_other(self, other: "Relation") -> list[z3.BoolRef]:
        if self.name != other.name:
            return []
        same = [a == b for a, b in zip(self.arguments, other.arguments, strict=True)]
        equal = [a == b for a, b in zip(self.results, other.results, strict=True)]
        laws = [z3.Implies(z3.And(same), z3.And(equal))]
        return laws + (self.laws(self, other) + self.laws(other, self) if self.laws else [])


def _laws_of(operand: Operand) -> Callable[[Relation, Relation], list[z3.BoolRef]]:
    def laws(one: Relation, other: Relation) -> list[z3.BoolRef]:
        i, j, a, b = one.arguments[-1], other.arguments[-1], one.results[0], other.results[0]
        found = [z3.Implies(i <= j, a <= b)] if operand.ordered else []
        return found + ([z3.Implies(a == b, i == j)] if operand.distinct else [])

    return laws


@dataclass
class Store:
    """A store's element, as a function of the program, the lanes and the steps of the loops."""

    site: str
    operand: Operand
    indices: list[Int]
    facts: list[Fact]
    relations: list[Relation]
    identity: list[str]  # programs and steps
    local: frozenset[str]  # unknowns that differ between programs, lanes and steps


@dataclass
class Launched:
    """One path through a launcher: its facts, and all stores of the kernel after it."""

    outputs: dict[str, Any]  # by name of each output, its chooser
    facts: list[Fact]
    memo: dict[Any, Any]
    counts: dict[str, int]
    programs: list[tuple[Int, Any]]
    stores: list[Store] = field(default_factory=list)


@dataclass
class Proof:
    """The claims and failures of one kernel in one mode."""

    widths: bool = True
    solver: Solver = field(default_factory=Solver)
    proved: int = 0
    failures: dict[str, str] = field(default_factory=dict)  # site: counterexample
    reached: set[str] = field(default_factory=set)  # sites whose access happens for some numbers
    launches: dict[tuple, Launched] = field(default_factory=dict)
    stops: bool = False  # at the first failure
    only_accesses: bool = False
    sites: set[str] = field(default_factory=set)

    def paths(self) -> Iterator[None]:
        """All paths, by the outcomes of unknown conditions."""
        values.proof, self.todo = self, [[]]
        while self.todo:
            self.begin(self.todo.pop())
            yield

    def begin(self, prefix: list[bool]) -> None:
        self.facts: list[Fact] = []
        self.relations: list[Relation] = []
        self.path: list[bool] = []
        self.prefix, self.memo = prefix, {}
        self.counts: dict[str, int] = defaultdict(int)  # unknowns with the same name
        self.programs: list[tuple[Int, Any]] = []
        self.local: set[str] = set()
        self.steps: list[Int] = []
        self.row_lane: Int | None = None  # which the next ``arange`` takes
        self.inside = False  # the launcher's part isn't

    def size(self, name: str, least: int = 1, most: int = 2**31 - 1) -> Int:
        """The unknown of a launch with this name."""
        if name not in self.counts:
            made = self.unknown(name, local=False)
            self.given(made.z >= least, made.z <= most)
        return Int({(name,): 1})

    def block(self, name: str) -> Int:
        """A tile's size: a multiple of 16."""
        if name not in self.counts:
            sixteenth = self.size(f"{name} / 16")
            self.given(self.size(name, 16, 512).z == 16 * sixteenth.z)
            self.solver.least |= {name: 16, f"{name} / 16": 1}
        return self.size(name)

    def unknown(self, name: str, local: bool = True) -> Int:
        count, self.counts[name] = self.counts[name], self.counts[name] + 1
        if local or count:
            name = f"{name}!{count}"
        if local:
            self.local.add(name)
        return Int({(name,): 1})

    def is_local(self, *exprs: z3.ExprRef) -> bool:
        return any(a in self.local for e in exprs for n in names_of(e) for a in n.split(DOT))

    def program(self, *counts: Any) -> None:
        """The launch's grid."""
        for i, count in enumerate(counts):
            self.local.add(f"program{i}")
            self.programs.append((Int({(f"program{i}",): 1}), count))

    def given(self, *claims: z3.BoolRef) -> None:
        self.facts += [Fact(claim) for claim in claims]

    def claims(self) -> list[z3.BoolRef]:
        laws = [
            law
            for i, one in enumerate(self.relations)
            for other in self.relations[:i]
            for law in one.with_other(other)
        ]
        return [fact.claim for fact in self.facts] + laws

    def prove(self, claim: z3.BoolRef, what: str, *given: z3.BoolRef) -> None:
        self.require(claim, what, [*self.claims(), *given])

    def require(self, claim: z3.BoolRef, what: str, facts: list[z3.BoolRef]) -> None:
        if what not in self.failures:
            example = self.why_not(claim, facts)
            if example is not None:
                self.failed(what, example)

    def why_not(self, claim: z3.BoolRef, facts: list[z3.BoolRef]) -> Any:
        """None if the claim follows; otherwise a counterexample, or "unknown"."""
        if not self.solver.follows(claim, facts):
            example = self.solver.example([*facts, z3.Not(claim)])
            if example != "none":
                return example
        self.proved += 1
        return None

    def failed(self, what: str, example: Any) -> None:
        if isinstance(example, dict):
            # Sizes and strides, and the program.
            shown = {name: n for name, n in example.items() if "!" not in name}
            example = ", ".join(f"{name} = {n}" for name, n in shown.items())
        self.failures[what] = example
        if self.stops:
            raise FailedError(what)

    def tallied(self, _: Tally) -> None:
        """Keep the facts at a sum in a loop."""
        self.tallied_facts, self.tallied_relations = list(self.facts), list(self.relations)
        self.tallied_step = self.steps[-1]

    def fits(self, made: Int) -> None:
        """The result of an operation in 32 bits doesn't wrap."""
        key = ("fits", tuple(sorted(made.poly.items())))
        if self.inside and self.widths and made.bits == 32 and key not in self.memo:
            self.memo[key] = True
            if {*made.poly} - {()}:
                claim = z3.And(made.z >= -(2**31), made.z < 2**31)
                self.prove(claim, f"32 bits: {self.where()}")

    def divided(self, a: Int, b: Int) -> tuple[Int, Int]:
        key = ("divided", tuple(sorted(a.poly.items())), tuple(sorted(b.poly.items())))
        if key not in self.memo:
            self.prove(b.z > 0, f"divisor: {self.where()}")
            bits = max(a.bits, b.bits)
            if b.poly == {(): 1}:
                return a, Int({}, bits)
            local = self.is_local(a.z, b.z)
            q, r = self.unknown("quotient", local), self.unknown("remainder", local)
            floor = z3.And(r.z >= 0, r.z < b.z, q.z >= 0, q.z <= a.z)
            truncated = z3.And(r.z <= 0, r.z > -b.z, q.z <= 0, q.z >= a.z)
            self.given((Int(q.poly, 64) * b + r).z == a.z)
            if self.solver.follows(a.z >= 0, self.claims()):
                self.given(floor)
            else:  # as in C
                self.given(z3.If(a.z >= 0, floor, truncated))
            self.memo[key] = Int(q.poly, bits), Int(r.poly, bits)
        return self.memo[key]

    def chosen(self, condition: z3.BoolRef, a: Any, b: Any) -> Int:
        a, b = as_int(a), as_int(b)
        key = ("chosen", condition, tuple(a.poly.items()), tuple(b.poly.items()))
        if key not in self.memo:
            made = self.unknown("chosen", self.is_local(condition, a.z, b.z))
            made.bits = max(a.bits, b.bits)
            self.given(z3.If(condition, made.z == a.z, made.z == b.z))
            self.memo[key] = made
        return self.memo[key]

    def branch(self, condition: z3.BoolRef) -> bool:
        facts, position = self.claims(), len(self.path)
        if position < len(self.prefix):
            taken = self.prefix[position]
        elif self.solver.follows(z3.Not(condition), facts):
            taken = False
        else:
            taken = True
            if not self.solver.follows(condition, facts):
                self.todo.append([*self.path, False])
        self.path.append(taken)
        self.facts.append(Fact(condition if taken else z3.Not(condition), CONDITION))
        return taken

    def where(self) -> str:
        frame, names = inspect.currentframe(), []
        while frame:
            if frame.f_code.co_filename.startswith("<kernel"):
                names.append(f"{frame.f_code.co_name}:{frame.f_lineno}")
            frame = frame.f_back
        return " < ".join(names)

    def access(self, kind: str, pointer: Pointer, mask: Bool | None) -> None:
        indices = pointer.operand.indices(pointer.address)
        self.touched(kind, pointer.operand, indices, [] if mask is None else [mask.claim])

    def descriptor_access(self, kind: str, descriptor: Descriptor, start: list[Int]) -> None:
        operand, given, indices = descriptor.operand, [], []
        for axis, (first, length) in enumerate(zip(start, descriptor.box, strict=True)):
            site = f"{kind} {operand.name} {self.where()}"
            self.prove(first.z >= 0, f"{site}: axis {axis} starts inside")
            indices.append(Int(first.poly, 64) + arange(0, length))
            given.append(indices[-1].z < operand.axes[axis][0].z)
        self.touched(kind, operand, indices, given)

    def touched(self, kind: str, operand: Operand, indices: list[Int], given: list) -> None:
        site = f"{kind} {operand.name} {self.where()}"
        for axis, (index, (size, _)) in enumerate(zip(indices, operand.axes, strict=True)):
            claim = z3.And(index.z >= 0, index.z < size.z)
            self.prove(claim, f"{site}: axis {axis}", *given)
        if self.only_accesses:
            return
        self.sites.add(site)
        if site not in self.reached or len(self.sites) == 1:  # and the first in each mode
            if isinstance(self.solver.example([*self.claims(), *given]), dict):
                self.reached.add(site)
            elif len(self.sites) == 1:
                self.failed(site, "no numbers show that this mode happens")
        if kind == "store":
            facts = [*self.facts, *[Fact(claim, CONDITION) for claim in given]]
            identity = [f"program{i}" for i in range(len(self.programs))]
            identity += [next(iter(step.poly))[0] for step in self.steps]
            self.launch.stores.append(
                Store(
                    site,
                    operand,
                    indices,
                    facts,
                    list(self.relations),
                    identity,
                    frozenset(self.local),
                )
            )

    def loaded(self, operand: Operand, indices: list[Int], mask: Bool | None, other: Any) -> Int:
        least, end, bits = operand.values
        found = self.unknown(operand.name)
        found.bits = bits
        inside = self.unknown(operand.name)  # the tensor's value, whether loaded or not
        bounds = [inside.z >= as_int(least).z] if least is not None else []
        bounds += [inside.z < as_int(end).z] if end is not None else []
        self.given(*bounds)
        self.relations.append(
            Relation(operand.name, [i.z for i in indices], [inside.z], _laws_of(operand))
        )
        given = mask.claim if mask is not None else z3.BoolVal(True)
        self.given(z3.If(given, found.z == inside.z, found.z == as_int(other or 0).z))
        return found


def arange(first: int, end: Any) -> Int:
    proof = values.proof
    lane = proof.row_lane or proof.unknown("lane")
    proof.row_lane = None
    claim = z3.And(lane.z >= as_int(first).z, lane.z < as_int(end).z)
    proof.facts.append(Fact(claim, CONDITION, next(iter(lane.poly))[0]))
    return lane


def loop(name: str, *bounds: Any) -> Iterator[Int]:
    """One step, for any number of steps before it."""
    proof = values.proof
    start, end, step = [0, *bounds, 1] if len(bounds) == 1 else [*bounds, 1][:3]
    start, end, step = map(as_int, (start, end, step))
    proof.prove(step.z > 0, f"step of a loop: {proof.where()}")
    facts, memo, relations = len(proof.facts), dict(proof.memo), len(proof.relations)
    proof.entered = set(proof.local)
    k = proof.unknown(f"step of {name}")
    k.bits = 64
    proof.given(k.z >= 0)
    index = Int(start.poly, 64) + k * step
    proof.facts.append(Fact(index.z < end.z, CONDITION))
    proof.steps.append(k)
    narrow = Int(index.poly, max(start.bits, end.bits, step.bits))
    proof.fits(narrow)
    proof.fits(Int((index + step).poly, narrow.bits))
    yield narrow
    proof.steps.pop()
    del proof.facts[facts:], proof.relations[relations:]
    proof.memo = memo


def carried(name: str, value: Any, after: bool) -> Any:
    """A variable that a loop's body assigns, at the body's begin, and after the loop."""
    if isinstance(value, Tally):
        return values.proof.tally(value) if after else value
    if after and isinstance(value, Int | Bool | Pointer):
        return Gone(name)
    if isinstance(value, int) and not isinstance(value, bool):
        return Tally(value)
    return Gone(name) if isinstance(value, Int | Bool | Pointer) else value


def advanced(value: Any, step: Any) -> Any:
    """A variable that grows by ``step`` in each step of the loop."""
    return value + values.proof.steps[-1] * step


class _Loops(ast.NodeTransformer):
    """Rewrites loops: each names its variable, and says which variables it carries."""

    def visit_For(self, node: ast.For) -> Any:
        self.generic_visit(node)
        called = ast.unparse(node.iter.func) if isinstance(node.iter, ast.Call) else ""
        if called not in ("range", "tl.range"):
            return node
        node.iter.func = ast.Name("__loop", ast.Load())
        node.iter.keywords = []
        node.iter.args.insert(0, ast.Constant(ast.unparse(node.target)))
        inner = [n for statement in node.body for n in ast.walk(statement)]
        stored = [n.id for n in inner if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        grows = {}
        for statement in node.body:
            if isinstance(statement, ast.AugAssign) and isinstance(statement.op, ast.Add):
                name, by = ast.unparse(statement.target), ast.unparse(statement.value)
                used = {n.id for n in ast.walk(statement.value) if isinstance(n, ast.Name)}
                if stored.count(name) == 1 and not used & {*stored}:
                    grows[name] = by
        before = ""
        after = ""
        for name in sorted({*stored} - {ast.unparse(node.target)}):
            begun = (
                f"__advanced({name}, {grows[name]})"
                if name in grows
                else f"__carried({name!r}, {name}, False)"
            )
            guard = "try:\n  {0} = {1}\nexcept UnboundLocalError: pass\n"
            before += guard.format(name, begun)
            after += guard.format(name, f"__carried({name!r}, {name}, True)")
        node.body = _parsed(before, node) + node.body
        return [node, *_parsed(after, node)]


def _parsed(source: str, at: ast.AST) -> list[ast.stmt]:
    body = ast.parse(source).body
    for statement in body:
        for node in ast.walk(statement):
            ast.copy_location(node, at)
    return body


class Language:
    """The substitute for ``triton.language``."""

    int32, int64, uint32, int16, int8 = "int32", "int64", "uint32", "int16", "int8"
    float32, float16, bfloat16, float8e4nv = "float32", "float16", "bfloat16", "float8e4nv"
    constexpr = object
    arange = staticmethod(arange)
    static_range = staticmethod(range)
    math = type("math", (), {"erf": staticmethod(lambda x: x)})
    PropagateNan = type("PropagateNan", (), {"ALL": None})

    @staticmethod
    def program_id(axis: int) -> Int:
        return Int(values.proof.programs[axis][0].poly)

    @staticmethod
    def num_programs(axis: int) -> Int:
        return Int(as_int(values.proof.programs[axis][1]).poly)

    @staticmethod
    def zeros(shape: tuple, dtype: str) -> Data:
        return Data(shape, dtype)

    @staticmethod
    def full(shape: tuple, _: Any, dtype: str) -> Data:
        return Data(shape, dtype)

    @staticmethod
    def load(pointer: Pointer, mask: Bool | None = None, other: Any = None) -> Any:
        values.proof.access("load", pointer, mask)
        operand = pointer.operand
        if operand.values is None:
            return Data((), operand.dtype)
        indices = operand.indices(pointer.address)
        return values.proof.loaded(operand, indices, mask, other)

    @staticmethod
    def store(pointer: Pointer, value: Any, mask: Bool | None = None) -> None:
        values.proof.access("store", pointer, mask)

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Any:
        if isinstance(condition, Bool) and all(type(each) in (Int, int) for each in (a, b)):
            return values.proof.chosen(condition.claim, a, b)
        return a if isinstance(a, Data) else b if isinstance(b, Data) else Data()

    @staticmethod
    def cdiv(a: Any, b: Any) -> Any:
        return (as_int(a) + (b - 1)) // b

    @staticmethod
    def sum(tile: Any, _: int) -> Any:
        return tile if isinstance(tile, Bool) else Data()

    @staticmethod
    def _elementwise(tile: Any, *others: Any, **_: Any) -> Any:
        return next((each for each in (tile, *others) if isinstance(each, Data)), Data())

    max = exp = log = abs = maximum = minimum = div_rn = sigmoid = gather = _elementwise

    @staticmethod
    def join(one: Data, _: Data) -> Data:
        return Data((*one.shape, 2), one.dtype)


def _tile_function(made: Callable, loads: bool) -> Callable:
    """``load_tile`` or ``store_tile``.

    With ``o_mem``, the tile's rows have its lanes.  A loaded tile has the shape that the call
    states; a descriptor's box must have it.
    """

    signature = inspect.signature(made)

    def called(of: Any, *listed: Any, **named: Any) -> Any:
        arguments = signature.bind(of, *listed, **named).arguments
        o_mem = arguments.get("o_mem")
        if o_mem is not None:
            values.proof.row_lane = o_mem.lane
        result = made(**arguments)
        if not loads:
            return None
        shape = arguments["BLOCK_ROWS"], arguments["BLOCK_COLUMNS"]
        if isinstance(of, Descriptor):
            box = [as_int(n).poly for n in of.box[-2:]]
            if box != [as_int(n).poly for n in shape]:
                values.proof.failed(f"load {of.operand.name}", "the box isn't the tile")
        return Data(shape, result.dtype)

    return called


def _row_numbers(made: Callable) -> Callable:
    def called(order: Any, i_row: Any, rows: Any, BLOCK: Any) -> Int:
        lane = values.proof.row_lane = values.proof.unknown("lane")
        result = made(order, i_row, rows, BLOCK)
        result.lane = lane
        return result

    return called


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


def mask_parts(tree: ast.AST) -> list[ast.expr]:
    """The conditions of all masks, each with others in a conjunction or by itself."""
    parts = []
    names, masks = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "mask":
            masks.append(node.value)
            names |= {node.value.id} if isinstance(node.value, ast.Name) else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in names:
            masks.append(node.value)
    for mask in masks:
        if isinstance(mask, ast.BinOp):
            parts += [mask.left, mask.right]
        elif not isinstance(mask, ast.Name):
            parts.append(mask)
    return parts


class _WithoutMask(ast.NodeTransformer):
    def __init__(self, part: ast.expr) -> None:
        self.part = part

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if node is self.part:
            return ast.copy_location(ast.Name("__always", ast.Load()), node)
        return super().generic_visit(node)


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
        self.contracts, self.edit = OPAQUE | contracts, edit
        self.made: dict[Any, Callable] = {}

    def function(self, jitted: Any) -> Callable:
        plain = getattr(jitted, "fn", jitted)
        if plain in self.made:
            return self.made[plain]
        source, name = textwrap.dedent(inspect.getsource(plain)), plain.__name__
        edit = self.edit if self.edit and self.edit.function == name else None
        if edit and edit.old:
            assert source.count(edit.old) == 1, f"{name} has {source.count(edit.old)} {edit.old!r}"
            source = source.replace(edit.old, edit.new)
        tree = ast.parse(source)
        if edit and not edit.old:
            tree = _WithoutMask(mask_parts(tree)[edit.mask]).visit(tree)
        definition = tree.body[0]
        assert isinstance(definition, ast.FunctionDef)
        definition.decorator_list = []
        for argument in definition.args.args:
            argument.annotation = None
        tree = ast.fix_missing_locations(_Loops().visit(tree))
        ast.increment_lineno(tree, inspect.getsourcelines(plain)[1] - 1)
        scope: dict[str, Any] = {
            "tl": Language, "min": values.smaller, "max": values.larger, "INTERPRETED": False,
            "__always": Bool(z3.BoolVal(True)), "__loop": loop,
            "__carried": carried, "__advanced": advanced,
        }  # fmt: skip
        for used in {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} - scope.keys():
            value = plain.__globals__.get(used)
            if used in self.contracts:
                scope[used] = self.contracts[used]
            elif hasattr(value, "fn"):
                scope[used] = self._later(value)
            elif value is not None:
                scope[used] = value
        exec(compile(tree, f"<kernel {name}>", "exec"), scope)
        made = scope[name]
        if name in ("load_tile", "store_tile"):
            made = _tile_function(made, name == "load_tile")
        elif name == "row_numbers":
            made = _row_numbers(made)
        self.made[plain] = made
        return self.made[plain]

    def _later(self, jitted: Any) -> Callable:
        return lambda *arguments, **named: self.function(jitted)(*arguments, **named)


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
        new = Launched(
            outputs, list(proof.facts), dict(proof.memo), dict(proof.counts), proof.programs
        )
        proof.launch = proof.launches.setdefault(tuple(proof.path), new)
        proof.inside = True
        for i, (program, count) in enumerate(proof.programs):
            claim = z3.And(program.z >= 0, program.z < as_int(count).z)
            proof.facts.append(Fact(claim, CONDITION, f"program{i}"))
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

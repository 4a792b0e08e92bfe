"""A proof's facts and claims, on each path through a launcher and its kernel."""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import z3

from . import values
from .numbers import DOT, Solver, names_of
from .values import Bool, Descriptor, FailedError, Int, Operand, Pointer, as_int


@dataclass
class Fact:
    """A claim that follows from the definition of an unknown, or a condition that decides whether
    the program, lane or step exists, or takes this branch."""

    claim: z3.BoolRef
    is_condition: bool = False
    of: str = ""  # the lane whose range this is


@dataclass
class Relation:
    """Integers that a function or a tensor gives for other integers: equal ones for equal ones.

    ``laws``: more laws of two such relations.
    """

    name: str
    arguments: list[z3.ArithRef]
    results: list[z3.ArithRef]
    laws: Callable[["Relation", "Relation"], list[z3.BoolRef]] = lambda one, other: []

    def renamed(self, pairs: list) -> "Relation":
        new = [[z3.substitute(n, *pairs) for n in s] for s in (self.arguments, self.results)]
        return Relation(self.name, *new, self.laws)

    def with_other(self, other: "Relation") -> list[z3.BoolRef]:
        if self.name != other.name:
            return []
        same = [a == b for a, b in zip(self.arguments, other.arguments, strict=True)]
        equal = [a == b for a, b in zip(self.results, other.results, strict=True)]
        law = z3.Implies(z3.And(same), z3.And(equal))
        return [law, *self.laws(self, other), *self.laws(other, self)]


def laws_among(relations: list[Relation]) -> list[z3.BoolRef]:
    pairs = [(one, other) for i, one in enumerate(relations) for other in relations[:i]]
    return [law for one, other in pairs for law in one.with_other(other)]


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
    """The claims of one kernel in one mode.  It ends at the first failure."""

    reached: set[str] = field(default_factory=set)  # sites whose access happens for some numbers
    solver: Solver = field(default_factory=Solver)
    proved: int = 0
    failure: str = ""  # the claim, and its counterexample
    launches: dict[tuple, Launched] = field(default_factory=dict)
    sites: set[str] = field(default_factory=set)

    def paths(self) -> Iterator[None]:
        """All paths, by the outcomes of unknown conditions."""
        values.proof, self.todo = self, [[]]
        while self.todo:
            self.prefix: list[bool] = self.todo.pop()
            self.path: list[bool] = []
            self.facts: list[Fact] = []
            self.relations: list[Relation] = []
            self.memo: dict[Any, Any] = {}
            self.counts: dict[str, int] = defaultdict(int)  # unknowns with the same name
            self.programs: list[tuple[Int, Any]] = []
            self.local: set[str] = set()
            self.steps: list[Int] = []
            self.inside = False  # the launcher's part isn't
            yield

    def enter_kernel(self, outputs: dict[str, Any]) -> None:
        """The launcher's part ends here.  Each program has a number."""
        copies = list(self.facts), dict(self.memo), dict(self.counts), self.programs
        self.launch = self.launches.setdefault(tuple(self.path), Launched(outputs, *copies))
        self.inside = True
        for i, (program, count) in enumerate(self.programs):
            claim = z3.And(program.z >= 0, program.z < as_int(count).z)
            self.facts.append(Fact(claim, True, f"program{i}"))

    def unknown(self, name: str, local: bool = True) -> Int:
        count, self.counts[name] = self.counts[name], self.counts[name] + 1
        if local or count:
            name = f"{name}!{count}"
        if local:
            self.local.add(name)
        return Int({(name,): 1})

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

    def program(self, *counts: Any) -> None:
        """The launch's grid."""
        for i, count in enumerate(counts):
            self.local.add(f"program{i}")
            self.programs.append((Int({(f"program{i}",): 1}), count))

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Facts that are stated inside hold only there."""
        facts, relations, memo = len(self.facts), len(self.relations), dict(self.memo)
        yield
        del self.facts[facts:], self.relations[relations:]
        self.memo = memo

    def given(self, *claims: z3.BoolRef) -> None:
        self.facts += [Fact(claim) for claim in claims]

    def claims(self) -> list[z3.BoolRef]:
        return [fact.claim for fact in self.facts] + laws_among(self.relations)

    def prove(self, claim: z3.BoolRef, what: str, *given: z3.BoolRef) -> None:
        self.require(claim, what, [*self.claims(), *given])

    def require(self, claim: z3.BoolRef, what: str, facts: list[z3.BoolRef]) -> None:
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
        if isinstance(example, dict):  # show sizes, strides and the program
            shown = [f"{name} = {n}" for name, n in example.items() if "!" not in name]
            example = ", ".join(shown)
        raise FailedError(f"{what}: {example}")

    def fits(self, made: Int) -> None:
        """The result of an operation in 32 bits doesn't wrap."""
        key = ("fits", tuple(sorted(made.poly.items())))
        if self.inside and made.bits == 32 and key not in self.memo:
            self.memo[key] = True
            if {*made.poly} - {()}:
                claim = z3.And(made.z >= -(2**31), made.z < 2**31)
                self.prove(claim, f"32 bits: {self.where()}")

    def is_local(self, *exprs: z3.ExprRef) -> bool:
        return any(a in self.local for e in exprs for n in names_of(e) for a in n.split(DOT))

    def divided(self, a: Int, b: Int) -> tuple[Int, Int]:
        key = ("divided", tuple(sorted(a.poly.items())), tuple(sorted(b.poly.items())))
        if key not in self.memo:
            self.prove(b.z > 0, f"divisor: {self.where()}")
            bits = max(a.bits, b.bits)
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

    def lane(self, length: Any) -> Int:
        """The number of an element along an axis of a tile.

        Vectors of one length have one lane, because no tile has two axes of the same length.
        """
        key = ("lane", tuple(as_int(length).poly.items()))
        if key not in self.memo:
            lane = self.memo[key] = self.unknown("lane")
            claim = z3.And(lane.z >= 0, lane.z < as_int(length).z)
            self.facts.append(Fact(claim, True, next(iter(lane.poly))[0]))
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
        self.facts.append(Fact(condition if taken else z3.Not(condition), True))
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
            indices.append(Int(first.poly, 64) + self.lane(length))
            given.append(indices[-1].z < operand.axes[axis][0].z)
        self.touched(kind, operand, indices, given)

    def touched(self, kind: str, operand: Operand, indices: list[Int], given: list) -> None:
        site = f"{kind} {operand.name} {self.where()}"
        lanes = [n for i in indices for n in names_of(i.z) if n.startswith("lane!")]
        if len(lanes) > len({*lanes}):
            self.failed(site, "two axes of a tile have the same length")
        for axis, (index, (size, _)) in enumerate(zip(indices, operand.axes, strict=True)):
            claim = z3.And(index.z >= 0, index.z < size.z)
            self.prove(claim, f"{site}: axis {axis}", *given)
        is_first = not self.sites  # in this mode
        self.sites.add(site)
        if site not in self.reached or is_first:
            if isinstance(self.solver.example([*self.claims(), *given]), dict):
                self.reached.add(site)
            elif is_first:
                self.failed(site, "no numbers show that this mode happens")
        if kind == "store":
            facts = [*self.facts, *[Fact(claim, True) for claim in given]]
            identity = [f"program{i}" for i in range(len(self.programs))]
            identity += [next(iter(step.poly))[0] for step in self.steps]
            unknowns = list(self.relations), identity, frozenset(self.local)
            self.launch.stores.append(Store(site, operand, indices, facts, *unknowns))

    def loaded(self, operand: Operand, indices: list[Int], mask: Bool | None, other: Any) -> Int:
        """An integer that addresses depend on."""
        least, end, bits = operand.values
        found, inside = self.unknown(operand.name), self.unknown(operand.name)
        found.bits = bits
        if least is not None:
            self.given(inside.z >= as_int(least).z, inside.z < as_int(end).z)
        tensor = Relation(operand.name, [i.z for i in indices], [inside.z], operand.laws)
        self.relations.append(tensor)
        given = mask.claim if mask is not None else z3.BoolVal(True)
        self.given(z3.If(given, found.z == inside.z, found.z == as_int(other or 0).z))
        return found

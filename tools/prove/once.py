"""Each element of an output is stored exactly once, by one program (or one plane)."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import z3

from .engine import Fact, Proof, Store, laws_among
from .numbers import DOT, names_of, variable
from .values import Int


@dataclass
class Choice:
    """The program and step that store an element.

    ``values``: by the name of an unknown, which are a program, a step of a loop, or a contract's
    result.  ``cases``: the element is in one of these cases, and one store covers each.  ``place``:
    the row in sorted order, where the element's row is ``order[place]``.
    """

    values: dict[str, Any]
    cases: list[z3.BoolRef] = field(default_factory=lambda: [z3.BoolVal(True)])
    place: Int | None = None


Chooser = Callable[[list[Int]], Choice]


def renaming(names: Iterable[str], local: Iterable[str], suffix: str) -> list[tuple]:
    """Pairs for z3.substitute that give local unknowns other names."""
    local, pairs = {*local}, []
    for name in names:
        factors = name.split(DOT)
        if local & {*factors}:
            new = tuple(sorted(f + suffix if f in local else f for f in factors))
            pairs.append((variable((name,)), variable(new)))
    return pairs


def all_names(store: Store) -> frozenset[str]:
    claims = [fact.claim for fact in store.facts] + [index.z for index in store.indices]
    claims += [n for r in store.relations for n in (*r.arguments, *r.results)]
    return frozenset().union(*map(names_of, claims))


def check_at_most_once(proof: Proof, stores: list[Store]) -> None:
    for i, one in enumerate(stores):
        for other in stores[i:]:
            pairs = renaming(all_names(other), other.local, "'")
            facts = [fact.claim for fact in one.facts]
            facts += [z3.substitute(fact.claim, *pairs) for fact in other.facts]
            facts += laws_among(
                [*one.relations, *[relation.renamed(pairs) for relation in other.relations]]
            )
            there = [z3.substitute(index.z, *pairs) for index in other.indices]
            facts += [a.z == b for a, b in zip(one.indices, there, strict=True)]
            claim = z3.BoolVal(False)
            if one is other:
                same = [variable((n,)) == variable((n + "'",)) for n in one.identity]
                claim = z3.And(same)
            proof.require(claim, f"stored once: {one.site} and {other.site}", facts)


def check_at_least_once(proof: Proof, stores: list[Store], chooser: Chooser) -> None:
    """Replay a store's facts, in order, with the program and lanes that store an element."""
    operand, launch = stores[0].operand, proof.launch
    what = f"every element stored: {operand.name}"
    element = [Int({(f"element{axis}",): 1}, 64) for axis in range(len(operand.axes))]
    inside = []
    for index, (size, _) in zip(element, operand.axes, strict=True):
        inside += [index.z >= 0, index.z < size.z]
    proof.facts, proof.relations = [*launch.facts, *[Fact(claim) for claim in inside]], []
    proof.inside, proof.memo, proof.local = False, dict(launch.memo), set()
    # New unknowns have other names than the kernel's.
    proof.counts = defaultdict(lambda: 1000, dict.fromkeys(launch.counts, 1000))
    proof.programs = launch.programs
    choice = chooser(element)
    chosen, relations = proof.claims(), proof.relations
    proof.require(z3.Or(choice.cases), f"{what}: cases", chosen)
    for case in choice.cases:
        failures = []
        for store in stores:
            failure = _replayed(proof, store, choice, element, [*chosen, case], relations)
            if failure is None:
                break
            failures.append(failure)
        else:
            proof.failed(what, failures[0])


def _replayed(
    proof: Proof, store: Store, choice: Choice, element: list[Int], facts: list, relations: list
) -> Any:
    """None if the store covers the element, otherwise a counterexample."""
    names = all_names(store)
    atoms = {atom for name in names for atom in name.split(DOT)}
    facts, lanes = list(facts), set()
    for name, value in choice.values.items():
        value = value.z if isinstance(value, Int) else z3.IntVal(value)
        found = [a for a in atoms if a == name or a.startswith(f"{name}!")]
        facts += [variable((atom,)) == value for atom in found]
    pairs = [(i.z, e.z) for i, e in zip(store.indices, element, strict=True)]
    if choice.place is not None:
        (place,) = [r.arguments[0] for r in store.relations if r.name == "order"]
        pairs[0] = place, choice.place.z
    for index, wanted in pairs:
        its = {name for name in names_of(index) if name.startswith("lane!") and DOT not in name}
        if its:  # the rest of the index is its lane
            facts.append(index == wanted)
            lanes |= its
    facts += laws_among([*store.relations, *relations])
    known = {fact.claim for fact in proof.launch.facts}
    for fact in store.facts:
        if fact.claim in known:
            continue
        if fact.is_condition and (not fact.of.startswith("lane!") or fact.of in lanes):
            failure = proof.why_not(fact.claim, facts)
            if failure is not None:
                return failure
        facts.append(fact.claim)
    same = z3.And([a.z == b.z for a, b in zip(store.indices, element, strict=True)])
    failure = proof.why_not(same, facts)
    if failure is None and not isinstance(proof.solver.example(facts), dict):
        return "no element shows that this isn't vacuous"
    return failure


def check(proof: Proof) -> None:
    """A store to any operand that isn't an output is a failure."""
    for launch in proof.launches.values():
        proof.launch, stores = launch, defaultdict(list)
        for store in launch.stores:
            stores[store.operand.name].append(store)
        if stores.keys() != launch.outputs.keys():
            proof.failed("stored once", f"{[*stores]} are stored, not {[*launch.outputs]}")
        for name, chooser in launch.outputs.items():
            check_at_most_once(proof, stores[name])
            check_at_least_once(proof, stores[name], chooser)

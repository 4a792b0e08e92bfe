"""Integers of a proof: polynomials over unknowns, and the solver that decides claims about them.

The solver sees linear arithmetic only.  Each product of unknowns is an unknown of its own, and
:func:`lemmas` states instances of laws that products obey.  A claim that follows from these
instances is proved.  Otherwise the solver gets the true products, and looks for a counterexample.
"""

import itertools
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import z3

DOT = "·"  # separates the factors in a product's name
Monomial = tuple[str, ...]  # the sorted names of the factors
Poly = dict[Monomial, int]
# Steps of the solver for one query, and for one search of an example.  They aren't seconds, so the
# results don't depend on a machine's pace.
_MOST, _SEARCHED = 20_000_000, 4_000_000


def plus(a: Poly, b: Poly, factor: int = 1) -> Poly:
    total = {m: a.get(m, 0) + factor * b.get(m, 0) for m in a | b}
    return {m: n for m, n in total.items() if n}


def times(a: Poly, b: Poly) -> Poly:
    total: Poly = {}
    for (m, i), (n, j) in itertools.product(a.items(), b.items()):
        key = tuple(sorted(m + n))
        total[key] = total.get(key, 0) + i * j
    return {m: n for m, n in total.items() if n}


def variable(monomial: Monomial) -> z3.ArithRef:
    return z3.Int(DOT.join(monomial)) if monomial else z3.IntVal(1)


def expression(poly: Poly) -> z3.ArithRef:
    terms = [n * variable(m) if m else z3.IntVal(n) for m, n in poly.items()]
    return z3.Sum(terms) if terms else z3.IntVal(0)


_names: dict[Any, frozenset[str]] = {}


def names_of(claim: z3.ExprRef) -> frozenset[str]:
    """The names of all unknowns in an expression."""
    if claim not in _names:
        if z3.is_const(claim) and claim.decl().kind() == z3.Z3_OP_UNINTERPRETED:
            _names[claim] = frozenset([str(claim)])
        else:
            _names[claim] = frozenset().union(*map(names_of, claim.children()))
    return _names[claim]


def without(monomial: Monomial, factors: Monomial) -> Monomial:
    return tuple(sorted((Counter(monomial) - Counter(factors)).elements()))


@lru_cache(maxsize=200_000)
def _of_split(x: Monomial, y: Monomial) -> z3.BoolRef:
    """Laws of the product x · y."""
    product, a, b = variable(tuple(sorted(x + y))), variable(x), variable(y)
    laws = []
    for one, other in ((a, b), (b, a)):
        laws += [
            z3.Implies(one == 0, product == 0),
            z3.Implies(one == 1, product == other),
            z3.Implies(z3.And(one >= 1, other >= 0), product >= other),
            z3.Implies(z3.And(one >= 2, other >= 0), product >= 2 * other),
            z3.Implies(z3.And(one <= -1, other >= 0), product <= -other),
        ]
    return z3.And(laws)


@lru_cache(maxsize=200_000)
def _of_pair(m: Monomial, n: Monomial) -> z3.BoolRef | None:
    """Laws of two products with a common factor c: x · c and y · c are ordered as x and y are."""
    x, y = without(m, n), without(n, m)
    c = without(m, x)
    bases = [[factor.split("!")[0] for factor in product] for product in (m, n)]
    if not c and len(m) == 2 and bases[0] == bases[1]:
        same = [variable((f,)) == variable((g,)) for f, g in zip(m, n, strict=True)]
        return z3.Implies(z3.And(same), variable(m) == variable(n))
    if not c or not x or not y:  # no common factor, or the laws of one product say it
        return None
    x, y, factor, left, right = map(variable, (x, y, c, m, n))
    return z3.Implies(
        factor >= 0,
        z3.And(
            z3.Implies(x == y, left == right),
            z3.Implies(x < y, left + factor <= right),
            z3.Implies(y < x, right + factor <= left),
        ),
    )


@lru_cache(maxsize=4096)
def lemmas(names: frozenset[str]) -> tuple[z3.BoolRef, ...]:
    products = {tuple(name.split(DOT)) for name in names if DOT in name}
    laws = {}
    todo = list(products)
    while todo:  # each split of a product into two factors
        product = todo.pop()
        for factor in {*product}:
            rest = without(product, (factor,))
            laws[factor, rest] = _of_split((factor,), rest)
            if len(rest) > 1 and rest not in products:
                products.add(rest)
                todo.append(rest)
    pairs = [_of_pair(*pair) for pair in itertools.combinations(sorted(products), 2)]
    return (*laws.values(), *[pair for pair in pairs if pair is not None])


class Solver:
    """Decides claims."""

    def __init__(self) -> None:
        self.least: dict[str, int] = {}  # unknowns that small counterexamples fix: the tiles

    def _check(self, claims: Iterable[z3.BoolRef], most: int = _MOST) -> tuple[str, z3.Solver]:
        solver = z3.Solver()
        solver.set("rlimit", most)
        solver.add(*claims)
        return str(solver.check()), solver

    def follows(self, claim: z3.BoolRef, facts: list[z3.BoolRef]) -> bool:
        """Whether the claim follows from the facts by the laws that :func:`lemmas` states."""
        claims = [*facts, z3.Not(claim)]
        names = frozenset().union(*map(names_of, claims))
        return self._check([*claims, *lemmas(names)])[0] == "unsat"

    def example(self, facts: list[z3.BoolRef]) -> dict[str, int] | str:
        """Numbers for which all facts hold; "none" if there are none, "unknown" if none is found.

        Products are true products here.  Small numbers are tried first.
        """
        names = frozenset().union(*map(names_of, facts))
        products = [tuple(name.split(DOT)) for name in names if DOT in name]
        atoms = sorted({f for p in products for f in p} | {n for n in names if DOT not in n})
        values = {name: z3.IntVal(n) for name, n in self.least.items() if name in atoms}
        small = [z3.And(variable((a,)) <= 300, variable((a,)) >= -300) for a in atoms]
        for bounds, fixed in ((small, True), ([], True), ([], False)):
            known = values if fixed else {}
            pairs = [(variable((name,)), n) for name, n in known.items()]
            pairs += [
                (variable(p), z3.Product([known.get(f, variable((f,))) for f in p]))
                for p in products
            ]
            claims = [z3.substitute(fact, *pairs) for fact in [*facts, *bounds]]
            verdict, solver = self._check(claims, _SEARCHED)
            if verdict == "sat":
                model = solver.model()
                found = {a: model[variable((a,))] for a in atoms if a not in known}
                found = {a: n.as_long() for a, n in found.items() if n is not None}
                return found | {a: n.as_long() for a, n in known.items()}
        return "none" if verdict == "unsat" else "unknown"

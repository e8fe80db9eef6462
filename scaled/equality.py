"""When two formulas are the same, and whether one leaves work to do that the other has done."""
import random

import sympy
from sympy import Rational

from scaled.algebra import ARITHMETIC, Formula, Many, leaves

RELATIONS = set("=<>≤≥≠")


def carried_out(response: Formula, reference: Formula) -> bool:
    """Whether the response leaves nothing to do that the reference has done: 17*3 and 12/4 restate
    a question, and so does 2x = 6 where the reference is x = 3. Where the reference is no rational
    number arithmetic may be written in other ways, but a sine stays a question unless the reference
    has one."""
    if True in map(is_solved, relations(reference.value)) and not all(
            map(is_solved, relations(response.value))):
        return False
    plain = all(leaf.is_Rational or leaf.is_infinite or leaf.is_Symbol
                for leaf in leaves(reference.value))
    return response.work <= reference.work | {"fraction"} | (set() if plain else ARITHMETIC)


def same(a, b) -> bool:
    """Whether two meanings are the same; x = 3 is 3, and x = 2 or x = 3 is the set of 2 and 3."""
    if is_named(a) != is_named(b) and not is_relation(b if is_named(a) else a):
        a, b = map(unnamed, (a, b))
    return identical(a, b)


def is_relation(value) -> bool:
    return isinstance(value, Many) and set(value.kind) <= RELATIONS


def relations(value) -> list[Many]:
    if is_relation(value) or not isinstance(value, Many):
        return [value] if isinstance(value, Many) else []
    return [relation for part in value.parts for relation in relations(part)]


def is_solved(relation: Many) -> bool:
    """x = 3 and 1 < x < 3, but not 2x = 6: a symbol by itself, and numbers."""
    names = [part for part in relation.parts if part.free_symbols]
    return len(names) == 1 and names[0].is_Symbol


def identical(a, b) -> bool:
    if isinstance(a, Many) != isinstance(b, Many):
        many, one = (a, b) if isinstance(a, Many) else (b, a)
        return many.kind == "set" and len(many.parts) == 1 and identical(many.parts[0], one)
    if not isinstance(a, Many):
        return equal(a, b)
    if is_relation(a) and is_relation(b):
        return same_relation(a, b)
    if a.kind != b.kind or len(a.parts) != len(b.parts):
        return False
    if a.kind not in ("set", "union"):
        return all(map(identical, a.parts, b.parts))
    left = list(b.parts)
    for part in a.parts:
        found = next((i for i, other in enumerate(left) if identical(part, other)), None)
        if found is None:
            return False
        del left[found]
    return True


def is_named(value) -> bool:
    """x = 3 or x ∈ [0, 3], which only name the value, or several for one name."""
    if isinstance(value, Many) and value.kind == "set":
        return all(map(is_named, value.parts)) and len({part.parts[0] for part in value.parts}) == 1
    return isinstance(value, Many) and (value.kind == "∈" or (
        value.kind == "=" and value.parts[0].is_Symbol
        and value.parts[0] not in value.parts[1].free_symbols))


def unnamed(value):
    """The value without its name."""
    if not is_named(value):
        return value
    return Many("set", tuple(map(unnamed, value.parts))) if value.kind == "set" else value.parts[1]


def same_relation(a: Many, b: Many) -> bool:
    """3x = 6 and x - 2 = 0 are the same: a side less the other is a multiple, of one sign for an
    inequality. Chains are compared side by side."""
    a, b = upwards(a), upwards(b)
    if a.kind != b.kind:
        return False
    if len(a.kind) > 1:
        return all(map(equal, a.parts, b.parts))
    left, right = a.parts[0] - a.parts[1], b.parts[0] - b.parts[1]
    if not left.free_symbols or left.free_symbols != right.free_symbols:
        return False
    ratio = sympy.cancel(left / right)
    return bool(ratio.is_Rational and (ratio > 0 or a.kind in "=≠" and ratio != 0))


def upwards(relation: Many) -> Many:
    if set(relation.kind) <= set(">≥"):
        kind = relation.kind[::-1].translate(str.maketrans(">≥", "<≤"))
        return Many(kind, relation.parts[::-1])
    return relation


def equal(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether sympy proves it. Numbers near each other are not equal: 1/2004! is not 1/2006!."""
    if a == b:
        return True
    if a.free_symbols != b.free_symbols or a.is_Rational and b.is_Rational:
        return False
    if a.has(sympy.oo) or b.has(sympy.oo):
        return False
    difference, draw = a - b, random.Random(0)
    place = {x: Rational(draw.randint(10**5, 10**6), 10**5 + 3) for x in
             sorted(a.free_symbols, key=str)}
    here, size = (abs(x.subs(place).evalf(30)) for x in (difference, a))
    if here.is_Float and size.is_Float and here > (1 + size) * Rational(1, 10**20):
        return False  # most wrong answers end here, and cheaply
    simple = sympy.simplify(difference)
    return bool(simple == 0 or not a.free_symbols and simple.equals(0))

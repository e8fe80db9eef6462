"""Formulas: a grammar of what is understood, what it means to sympy, and when two are equal.

The grammar is ours because a text that it does not derive in full must have no meaning at all.
Parsers that skip what they do not know, or take the letters of a word for factors, make one formula
of many texts."""
import re
from math import gcd
from typing import NamedTuple

import lark
import sympy
from sympy import Rational

GRAMMAR = r"""
start: item ("," item)*
?item: sum | group | union | relation | matrix | SYMBOL "∈" (group | union) -> member
group: "(" item ("," item)+ ")" -> tuple | "[" item ("," item)+ "]" -> closed
     | "(" item "," item "]" -> left_open | "[" item "," item ")" -> right_open
     | "\\{" item ("," item)* "\\}" -> set | "{" item ("," item)+ "}" -> set
union: group ("∪" group)+
relation: sum (RELATION sum)+
matrix: BEGIN row ("\\\\" row)* END
row: sum ("&" sum)*

?sum: product | sum "+" product -> add | sum "-" product -> subtract | sum "±" product -> either
?product: signed | product "*" signed -> multiply | product "/" divisor -> divide
?signed: chain | "-" signed -> negative | "+" signed | "±" signed -> both
?chain: factors | factors bares -> multiply | bares | MIXED -> mixed | "|" sum "|" -> absolute
?bares: bare | bares bare -> multiply
?factors: divisor | factors factor -> multiply
?divisor: factor | number | number "^" exponent -> power
?number: NUMBER -> number | NUMBER "!" -> factorial | NUMBER "°" -> degrees
?factor: base | base "^" exponent -> power
?base: atom | atom "!" -> factorial
?atom: SYMBOL -> symbol | "{" SYMBOL "}" -> symbol | "(" sum ")"
     | "\\frac" "{" sum "}" "{" sum "}" -> divide | "\\binom" "{" sum "}" "{" sum "}" -> binomial
     | "\\sqrt" ("{" sum "}" | "(" sum ")") -> root | "\\sqrt" "[" NUMBER "]" "{" sum "}" -> root
     | "\\lfloor" sum "\\rfloor" -> floor | "\\lceil" sum "\\rceil" -> ceiling
     | (TRIG | LOG) ("(" sum ")" | "{" sum "}") -> function
     | TRIG "^" (NUMBER | "{" NUMBER "}") ("(" sum ")" | "{" sum "}") -> function
     | "\\log" "_" base_of_log ("(" sum ")" | "{" sum "}") -> logarithm
?bare: TRIG (single | coefficient) -> function | LOG single -> function
     | TRIG "^" (NUMBER | "{" NUMBER "}") (single | coefficient) -> function
     | "\\log" "_" base_of_log single -> logarithm
?base_of_log: NUMBER -> number | SYMBOL -> symbol | "{" sum "}"
?single: number | SYMBOL -> symbol
coefficient: NUMBER SYMBOL
?exponent: NUMBER -> number | "-" NUMBER -> minus | SYMBOL -> symbol | "{" sum "}" | "(" sum ")"

MIXED.3: /[0-9]+(\\frac\{[0-9]+\}\{[0-9]+\}| [0-9]+\/[0-9]+)/
NUMBER.2: /([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?/
TRIG.2: /\\(sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh)(?![a-zA-Z])/
LOG.2: /\\(ln|log|exp)(?![a-zA-Z_])/
SYMBOL: /([a-zA-Zπ∞]|\\(alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|omega)
    (?![a-zA-Z]))(_([0-9a-zA-Z]|\{[0-9a-zA-Z]+\}))?/x
RELATION: "=" | "<" | ">" | "≤" | "≥" | "≠"
BEGIN: /\\begin\{[pb]?matrix\}/
END: /\\end\{[pb]?matrix\}/
%ignore " "
"""

PARSER = lark.Lark(GRAMMAR, parser="lalr")
ARITHMETIC = {"add", "subtract", "multiply", "divide", "power", "root", "either", "absolute"}
NO_FACTORS = {"no", "yes", "not", "mod", "gcd", "lcm", "max", "min", "det", "lim", "deg", "the",
              "sin", "cos", "tan", "cot", "sec", "csc", "ln", "log", "exp", "abs"}


class Unknown(Exception):
    """A text that has no meaning here, or one too large to be worked out."""


class Many(NamedTuple):
    """A set, tuple, interval, union, matrix or relation."""
    kind: str
    parts: tuple


class Formula(NamedTuple):
    value: sympy.Expr | Many
    work: frozenset  # the operations that are left to do in it


def read(text: str) -> Formula:
    """What a text in its normal spelling means. Unknown if it is not understood in full."""
    if len(text) > 400 or max(text.count(c) for c in "({[|") > 40:
        raise Unknown("too long")
    letters = re.sub(r"\\(?:begin|end)\{[a-z]*\}|\\[a-zA-Z]+|_\{[a-zA-Z0-9]+\}", "#", text)
    words = set(re.findall("[a-zA-Z]{2,}", letters))
    if (words & NO_FACTORS or any(len(word) > 3 for word in words)
            or re.search("[0-9] [a-zA-Z]{2}", text)):  # 2 men
        raise Unknown("words")
    many = words or re.search("[a-zA-Z] [a-zA-Z]", letters)
    if many and not re.search(r"[0-9+=^]|\\frac", text):
        raise Unknown("letters that are no formula: cat is not act")
    if re.search(r"(?<![a-zA-Z\\])[fghFGHPQ]\(", text):
        raise Unknown("a function")
    try:
        tree = PARSER.parse(text)
        value = Meaning().transform(tree)
    except (lark.exceptions.LarkError, ValueError, TypeError, RecursionError) as error:
        raise Unknown(str(error)) from error
    if any(leaf.has(sympy.nan, sympy.zoo, sympy.Dummy) for leaf in leaves(value)):
        raise Unknown("no value")
    work = {operation(node) for node in tree.iter_subtrees()} & (ARITHMETIC | {
        "factorial", "binomial", "floor", "ceiling", "logarithm", "fraction", "double negative"})
    return Formula(value, frozenset(work | set(tree.scan_values(
        lambda token: token.type in ("TRIG", "LOG")))))


def operation(node: lark.Tree) -> str:
    """A fraction of whole numbers in lowest terms is one that nobody has to work out; 6/8 is not,
    nor is one half over two thirds."""
    if node.data == "negative" and node.children[0].data == "negative":
        return "double negative"
    if node.data != "divide":
        return node.data
    parts = [part.children[0] if part.data == "negative" else part for part in node.children]
    if not all(part.data == "number" and part.children[0].isdecimal() for part in parts):
        return "divide"
    top, bottom = (int(part.children[0]) for part in parts)
    return "fraction" if bottom > 1 and gcd(top, bottom) == 1 else "divide"


def leaves(value):
    if isinstance(value, Many):
        return [leaf for part in value.parts for leaf in leaves(part)]
    return [value]


# ----------------------------------------------------------------------------------- what is meant
@lark.v_args(inline=True)
class Meaning(lark.Transformer):
    def number(self, token):
        if not re.fullmatch(r"[0-9.]{1,400}(?:[eE][+-]?[0-9]{1,3})?", token):
            raise ValueError("too large")
        return Rational(str(token))

    def mixed(self, token):
        whole, top, bottom = map(int, re.findall("[0-9]+", token))
        if not 0 < top < bottom:
            raise ValueError("not a mixed number")
        return whole + Rational(top, bottom)

    def symbol(self, token):
        known = {"π": sympy.pi, "∞": sympy.oo, "e": sympy.E, "i": sympy.I}
        return known.get(str(token)) or sympy.Symbol(re.sub(r"[\\{}]", "", token))

    def power(self, base, exponent):
        if base.is_Rational and exponent.is_Rational:
            bits = max(abs(base.p), base.q).bit_length() * (abs(exponent) + 1)
            if bits > 50_000 or base == 0 and exponent <= 0:
                raise ValueError("too large")
        elif base.is_number and exponent.is_Integer and abs(exponent) > 1000:
            raise ValueError("too large")
        return base ** exponent

    def factorial(self, n):
        n = n if isinstance(n, sympy.Expr) else self.number(n)
        if n.is_number and not (n.is_Integer and 0 <= n <= 3000):
            raise ValueError("too large")
        return sympy.factorial(n)

    def binomial(self, n, k):
        if not (n.is_Integer and k.is_Integer and 0 <= k <= n <= 3000):
            raise ValueError("too large")
        return sympy.binomial(n, k)

    def root(self, *arguments):
        *degree, radicand = arguments
        n = int(degree[0]) if degree else 2
        if not 2 <= n <= 100:
            raise ValueError("not a root")
        if radicand.is_Rational and radicand < 0 and n % 2:
            return -self.power(-radicand, Rational(1, n))
        return self.power(radicand, Rational(1, n))

    def function(self, name, *arguments):
        *exponent, x = arguments
        name = name[1:].replace("arc", "a")
        # \log without a base is the natural one here and the decimal one there
        f = {"ln": sympy.log, "log": sympy.Function("log_")}.get(name) or getattr(sympy, name)
        return f(x) ** int(exponent[0]) if exponent else f(x)

    def logarithm(self, base, x):
        return sympy.log(x) / sympy.log(base)

    def either(self, a, b):
        return a + sympy.Dummy() * b

    def both(self, a):
        return sympy.Dummy() * a

    def relation(self, *parts):
        return Many("".join(parts[1::2]), parts[::2])

    def start(self, *items):
        items = tuple(one for item in items for one in both_signs(item))
        return items[0] if len(items) == 1 else Many("set", items)

    def set(self, *items):
        return Many("set", tuple(one for item in items for one in both_signs(item)))

    def coefficient(self, number, symbol):
        return self.number(number) * self.symbol(symbol)

    add, subtract = (lambda self, a, b: a + b), (lambda self, a, b: a - b)
    multiply, divide = (lambda self, a, b: a * b), (lambda self, a, b: a / b)
    negative, absolute = (lambda self, a: -a), (lambda self, a: sympy.Abs(a))
    floor, ceiling = (lambda self, a: sympy.floor(a)), (lambda self, a: sympy.ceiling(a))
    degrees = lambda self, token: self.number(token) * sympy.pi / 180
    minus = lambda self, token: -self.number(token)
    member = lambda self, symbol, group: Many("∈", (self.symbol(symbol), group))
    matrix = lambda self, begin, *rows: Many("matrix", rows[:-1])

    def __default__(self, kind, parts, _):  # tuple, closed, left_open, right_open, union, row
        return Many(str(kind), tuple(parts))


def both_signs(item) -> list:
    """The item, or with one plus-minus in it two."""
    signs = {sign for leaf in leaves(item) for sign in leaf.atoms(sympy.Dummy)}
    if len(signs) > 1:
        raise ValueError("two plus-minus")
    return [replace(item, sign, s) for sign in signs for s in (1, -1)] or [item]


def replace(item, sign, s):
    if isinstance(item, Many):
        return Many(item.kind, tuple(replace(part, sign, s) for part in item.parts))
    return item.subs(sign, s)

"""The process in which math_verify judges answers: `python -m scaled.judge SECONDS` reads one JSON
line [reference, text] after another, until its input ends, and prints a verdict on each.
"""
import ast
import json
import logging
import os
import re
import resource
import signal
import sys
from functools import partial


def serve(seconds: float):
    """What a process of MathVerify does: lines of [reference, text] in, verdicts out."""
    import math_verify
    import math_verify.parser
    import sympy.physics.units  # noqa: F401  otherwise imported late, and its import needs eval
    from sympy.parsing import sympy_parser
    # sympy reads every number by eval, and a plain sum such as "1/2+3" too. No text of a model is
    # ever run here: what would be goes to arithmetic instead.
    sympy_parser.eval_expr = arithmetic
    math_verify.parser.parse_expr_cached = partial(arithmetic, evaluate=False)

    def parse(text: str) -> list:
        return math_verify.parse(text, parsing_timeout=None, raise_on_error=True)

    logging.disable()  # math_verify warns that it has no time limit: it has ours
    parse("$\\frac{1}{2}$")  # the first one builds tables
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, and then input ends
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # no handler: the kernel ends the process
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # bytes, for what grows
    verdicts, nowhere = os.fdopen(os.dup(1), "w"), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1), os.dup2(nowhere, 2)  # parsers print what they think of an input
    print("ready", file=verdicts, flush=True)
    for line in sys.stdin:
        reference, text = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            gold = parse(as_latex(reference))
            right = bool(gold) and math_verify.verify(
                gold, parse(text), timeout_seconds=None, raise_on_error=True)
            verdict = "reference" if not gold else "right" if right else "wrong"
        except Exception:
            verdict = "error"
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(verdict, file=verdicts, flush=True)


def as_latex(reference: str) -> str:
    """A reference answer as math_verify recognises it: what follows GSM8K's ####, as a formula
    unless it has one. Bare \\sqrt{2} or (1, 2) would not be found, or only a number in it."""
    answer = reference.rpartition("####")[2].strip()
    return answer if re.search(r"(?<!\\)\$|\\boxed|\\\(|\\\[", answer) else f"${answer}$"


def arithmetic(code: str, *_, evaluate: bool = True):
    """A sympy expression of numbers, + - * / ** and parentheses; a number or symbol can also be
    written as sympy does, Integer(42). ValueError or SyntaxError for anything else."""
    import sympy
    code = code.strip()

    def build(node):
        match node:
            case ast.Constant(value=int(value)) if not isinstance(value, bool):
                return sympy.Integer(value)
            case ast.Constant(value=float()):
                return sympy.Float(ast.get_source_segment(code, node))
            case ast.Call(func=ast.Name(id="Integer" | "Float" | "Symbol" as name),
                          args=[ast.Constant(value=value)], keywords=[]):
                return getattr(sympy, name)(value)
            case ast.UnaryOp(op=ast.UAdd(), operand=x):
                return build(x)
            case ast.UnaryOp(op=ast.USub(), operand=x):
                return negative(build(x))
            case ast.BinOp(left=x, op=ast.Add(), right=y):
                return sympy.Add(build(x), build(y), evaluate=evaluate)
            case ast.BinOp(left=x, op=ast.Sub(), right=y):
                return sympy.Add(build(x), negative(build(y)), evaluate=evaluate)
            case ast.BinOp(left=x, op=ast.Mult(), right=y):
                return sympy.Mul(build(x), build(y), evaluate=evaluate)
            case ast.BinOp(left=x, op=ast.Div(), right=y):
                inverse = sympy.Pow(build(y), -1, evaluate=evaluate)
                return sympy.Mul(build(x), inverse, evaluate=evaluate)
            case ast.BinOp(left=x, op=ast.Pow(), right=y):
                return sympy.Pow(build(x), build(y), evaluate=evaluate)
        raise ValueError(f"not arithmetic: {code:.80}")

    def negative(x):
        return sympy.Mul(-1, x, evaluate=evaluate or x.is_Number)

    return build(ast.parse(code, mode="eval").body)


if __name__ == "__main__":
    serve(float(sys.argv[1]))

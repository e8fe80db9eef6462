"""The reward `math`: every pair of the table, formulas against sympy's own printer, arithmetic against
fractions."""
import random
from fractions import Fraction

import pytest
import sympy
from answer_pairs import PAIRS

from scaled.algebra import Unknown, read
from scaled.answers import final_answer, normal
from scaled.checks import check_reward
from scaled.data import Prompt
from scaled.equality import same
from scaled.judge import right
from scaled.rewards import Math, take_counts

TABLE = [pair for pairs in PAIRS.values() for pair in pairs]


@pytest.fixture(scope="module")
def math():
    reward = Math(seconds=20, workers=2)  # far from what an answer takes on a busy machine
    yield reward
    reward.close()


def prompts_of(references):
    return [Prompt(f"data.jsonl:{i}", [1, 2], answer) for i, answer in enumerate(references)]


def test_the_table(math):
    assert len(TABLE) > 300 and len(set(TABLE)) == len(TABLE)
    pairs = random.Random(0).sample(TABLE, len(TABLE))  # which worker gets which says nothing
    references, texts, expected = zip(*pairs)
    rewards = math(prompts_of(references), list(texts), [[2]] * len(pairs))
    assert [(pair, reward) for pair, reward in zip(pairs, rewards) if pair[2] != reward] == []
    assert take_counts(math) == {"errors": 0, "timeouts": 0}


def test_every_reference_of_the_table_can_be_answered(math):
    check_reward(math, prompts_of({reference for reference, _, _ in TABLE}))


@pytest.mark.parametrize("reference", [
    "", " ", "$", "####", "3 + 4 = 7\n####", "\\boxed{", "}{", "\\frac{1}{2", "\u200b", "\\text{}", "**",
    pytest.param("9" * 6000, id="long")])
def test_a_reference_that_cannot_be_answered_is_refused_with_its_row(math, reference):
    with pytest.raises(ValueError, match="prompt data.jsonl:2") as refusal:
        check_reward(math, prompts_of(["42", "x+y=0", reference, "7"]))
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400


def test_wrong_formulas_are_not_read_in_part():
    for text in [
            "2 3", "x2", "3!!", "1/2x", "\\sin xy", "\\ln 2x", "\\frac{1}{2}3", "2^{3}^{2}", "(1,2", "1,2)", "4{2}",
            "5?", "5_8", "\\phantom{5}", "\\input{x}", "east", "2 men", "f(2)", "3:2", "1,,2", "x\\approx3",
            "9^{9^{9}}", "10000!", "2^{100000}", "\\frac{1}{0}", "∞-∞", "0^0", "2\\frac{3}{2}", "±1±2", "x y", "1e9999",
            "(" * 41 + "1" + ")" * 41, "1+" * 250 + "1"]:
        with pytest.raises(Unknown):
            read(normal(text).text)


def test_sympy_prints_what_is_read():
    """Random formulas as LaTeX, by another hand than the reader's."""
    draw, (x, y) = random.Random(0), sympy.symbols("x y")

    def formula(depth):
        if depth == 0:
            return draw.choice([x, y, sympy.pi, sympy.Integer(draw.randint(1, 40)),
                                sympy.Rational(draw.randint(1, 9), draw.randint(2, 9))])
        a, b = formula(depth - 1), formula(draw.randint(0, depth - 1))
        return draw.choice([lambda: a + b, lambda: a * b, lambda: a - b, lambda: a / (b**2 + 1),
                            lambda: a ** draw.randint(2, 4), lambda: sympy.sqrt(a**2 + 1), lambda: sympy.sin(a),
                            lambda: sympy.log(b**2 + 2), lambda: sympy.exp(b), lambda: sympy.Abs(a) + 1])()

    read_back = 0
    for _ in range(200):
        expected = formula(draw.randint(1, 3))
        text = sympy.latex(expected, ln_notation=True, fold_short_frac=draw.random() < 0.5)
        try:
            value = read(normal(text).text).value
        except Unknown:  # such as 2 |x|, or a fraction of several lines
            continue
        read_back += 1
        point = {x: sympy.Rational(7, 3), y: sympy.Rational(-5, 7)}
        got, wanted = (v.subs(point).evalf(30) for v in (value, expected))
        assert abs(got - wanted) <= 1e-20 * (1 + abs(wanted)), text
    assert read_back > 120


def test_rational_arithmetic_is_that_of_fractions():
    """Both the value and a value one step off, in every spelling of a number."""
    draw = random.Random(1)
    for _ in range(300):
        value = Fraction(draw.randint(-2000, 2000), draw.choice([1, 1, 2, 3, 4, 5, 7, 8, 10, 25, 1000]))
        top, bottom, sign = abs(value.numerator), value.denominator, "-" * (value < 0)
        whole, rest = divmod(top, bottom)
        spellings = [f"{sign}\\frac{{{top}}}{{{bottom}}}", f"{sign}{top}/{bottom}"] if bottom > 1 else [
            f"{int(value)}", f"{int(value):,}", f"{float(value):.1f}", f"{int(value):,}".replace(",", "{,}")]
        if bottom > 1 and whole:
            spellings += [f"{sign}{whole}\\frac{{{rest}}}{{{bottom}}}", f"{sign}{whole} {rest}/{bottom}"]
        if Fraction(str(float(value))) == value:
            spellings += [str(float(value)), f"{float(value):e}"]
        a, b = draw.choice(spellings), draw.choice(spellings)
        off = value + draw.choice([-1, 1]) * draw.choice([1, Fraction(1, 10), Fraction(1, 1000)])
        other = f"{off.numerator}/{off.denominator}" if off.denominator > 1 else str(off)
        assert right(a, f"\\boxed{{{b}}}"), (a, b)
        assert not right(a, f"\\boxed{{{other}}}"), (a, other)


def test_equality_is_symmetric_and_no_list_hides_another():
    formulas = []
    for reference, text, _ in TABLE:
        for part in (final_answer(reference, True), final_answer(text)):
            try:
                formulas.append(read(normal(part).text).value)
            except Unknown:
                continue
    for a, b in random.Random(0).sample([(a, b) for a in formulas for b in formulas], 2000):
        assert same(a, b) == same(b, a)

"""Whether a response has the reference's answer. A worker judges, since no formula of a stranger
can be trusted to end, or to fit into memory."""
import re
import resource
from functools import lru_cache

from scaled.algebra import Formula, Unknown, read
from scaled.answers import Answer, final_answer, normal, unit_name
from scaled.equality import carried_out, same

LONGEST = 5000  # characters of an answer
CHOICE = re.compile(r"\(?([A-J])(?:\)|[.:])(.*)")
MEMORY = 4 << 30  # bytes, for what grows
NAMED = re.compile(r"([a-zA-Z]{2,}|[a-zA-Z]\([a-z]\)|[a-zA-Z])=([^=<>≤≥≠]+)")
PERCENT = unit_name("%")
# Letters whose order may mean something: H_2O, NaCl, AaBb, the word CAB. No policy shall learn to shuffle them.
SYMBOLS = re.compile(r"(?:[A-Z][a-z]?(?:_(?:[0-9]|\{[0-9]+\}))?){2,}")


def verdict(reference: str, text: str | None) -> str:
    """In a worker: right, wrong or error. None is the reference itself, in a box."""
    limit_memory()
    if text is None:
        text = f"\\boxed{{{final_answer(reference, True)}}}"
    try:
        return "right" if right(reference, text) else "wrong"
    except Exception:  # sympy can raise anything
        return "error"


def extract(text: str) -> str | None:
    """In a worker: the final answer as it stands, None for none."""
    limit_memory()
    found = final_answer(text).strip()
    return found if len(found) <= LONGEST and normal(found).text else None


def alike(a: str, b: str) -> bool:
    """In a worker: whether each answers a question whose reference is the other. 51 answers 17*3,
    but 17*3 does not answer 51."""
    limit_memory()
    a, b = normal(a), normal(b)
    return same_answer(a, b) and same_answer(b, a)


@lru_cache
def limit_memory():
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def right(reference: str, text: str) -> bool:
    """Whether the final answer of `text` is the reference."""
    return same_answer(answer_of(reference, True), normal(final_answer(text)[:LONGEST + 1]))


def same_answer(gold: Answer, given: Answer) -> bool:
    """Whether one answers what the other does: the same text in the normal spelling, the same
    choice, or the same formula, with nothing left to do."""
    if not any(c.isalnum() or c in "∞∅" for c in gold.text) or len(gold.text) > LONGEST:
        return False  # no answer at all
    if not given.text or len(given.text) > LONGEST:
        return False
    if PERCENT in (gold.unit, given.unit) and gold.unit != given.unit:
        return right_percent(gold, given)
    if gold.unit and given.unit and gold.unit != given.unit:
        return False  # where one has no unit it goes without saying
    if choice := re.fullmatch(r"([A-J])|\(?([A-J])\).*", gold.text):
        return letter(given.text) == (choice[1] or choice[2])
    gold_text, given_text = without_names(gold.text, given.text)
    if key(gold_text) == key(given_text):
        return True
    if SYMBOLS.fullmatch(gold_text):
        a, b = (re.sub(r"_\{([0-9])\}", r"_\1", text.replace(" ", "")) for text in (gold_text, given_text))
        return a == b
    gold_formula, formula = meaning(gold_text), meaning(given_text)
    return (gold_formula is not None and formula is not None
            and carried_out(formula, gold_formula) and same(gold_formula.value, formula.value))


@lru_cache(maxsize=256)  # a group has one reference
def answer_of(text: str, reference: bool) -> Answer:
    return normal(final_answer(text, reference))


@lru_cache(maxsize=256)
def meaning(text: str) -> Formula | None:
    try:
        return read(text)
    except Unknown:
        return None


def letter(text: str) -> str:
    """The letter of a multiple choice: B, (B), "B) 42"; not of "B) or C)"."""
    if re.fullmatch("[A-J]", text):
        return text
    found = CHOICE.fullmatch(text)
    more = found and re.search(r"(?<![a-zA-Z])[A-Z](?![a-zA-Z])|,", found[2])
    return found[1] if found and not more else ""


def without_names(gold: str, given: str) -> tuple[str, str]:
    """"Area = 5" is 5, unless both sides are equations of different names."""
    a, b = (found if (found := NAMED.fullmatch(text)) and found[1] not in found[2] else None
            for text in (gold, given))
    if a and b:
        return (a[2], b[2]) if a[1] == b[1] else (gold, given)
    if re.search("[=<>≤≥≠]", gold if b else given):
        return gold, given
    return a[2] if a else gold, b[2] if b else given


def key(text: str) -> str:
    """Words of three letters or more, and no, are the same in small and capital letters; genotypes
    such as Aa and AA, and variables, are not."""
    if not re.fullmatch(r"(?:[A-Z]?[a-z]+|[A-Z]+|[ ,'-])+", text):
        return text
    return re.sub(r"(?i)[a-z]{3,}|\bno\b", lambda word: word[0].casefold(), text)


def right_percent(gold: Answer, given: Answer) -> bool:
    """50% is one half. "What percentage?" may also be answered without the sign, and a reference
    above 1 has then left it out."""
    if gold.unit and given.unit:
        return False  # percent and dollars
    formulas = [meaning(gold.text), meaning(given.text)]
    if not all(f and f.work <= {"fraction"} and getattr(f.value, "is_Rational", False)
               for f in formulas):
        return False
    a, b = (f.value for f in formulas)
    if gold.unit:
        return b in (a, a / 100)
    return b == (a if abs(a) > 1 else 100 * a)

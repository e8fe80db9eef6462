"""The final answer in a text, and one spelling for what is written in many ways. What a reader can
tell apart never becomes the same here, and what is not known stays as it is: every difference that
is dropped is one that a policy finds."""
import re
import unicodedata
from typing import NamedTuple

SIGNS = {  # what stands for other characters and commands of LaTeX
    "-": "− ﹣ － ‐ ‑", "*": "× · ⋅ ∙ ∗ \\cdot \\times \\ast", "/": "÷ ∕ ⁄ \\div",
    "≤": "⩽ \\leq \\le \\leqslant", "≥": "⩾ \\geq \\ge \\geqslant", "≠": "\\neq \\ne", "<": "\\lt",
    ">": "\\gt", "∞": "\\infty", "π": "\\pi", "∪": "\\cup", "∈": "\\in", "±": "\\pm",
    "∅": "\\emptyset \\varnothing", "°": "º ˚ \\degree", "|": "∣ \\lvert \\rvert \\vert",
    "\\{": "\\lbrace", "\\}": "\\rbrace", "\\frac": "\\dfrac \\tfrac \\cfrac",
    "\\binom": "\\dbinom \\tbinom", '"': "“ ”", "'": "‘ ’ ′", " ": "~ \\quad \\qquad",
    "": "\u200b \u2060 \ufeff \\left \\right \\big \\bigl \\bigr \\Big \\Bigl \\Bigr "
        "\\displaystyle"}
SIGN = {other: sign for sign, others in SIGNS.items() for other in others.split(" ")}
OPEN = r"\\(?:text(?:bf|it|rm|sf|normal)?|math(?:rm|bf|it|sf)|mbox|operatorname)\s*\{"

NAMES = [r"\$|dollars?|USD", "€|euros?", "£", "¢|cents?", "%|percent", "°C|degrees? Celsius",
         "°F|degrees? Fahrenheit", "°|degrees?", "mm|milli(?:meter|metre)s?",
         "cm|centi(?:meter|metre)s?", "km|kilo(?:meter|metre)s?", "m|(?:meter|metre)s?",
         "in|inch(?:es)?", "ft|foot|feet", "yd|yards?", "mi|miles?", "kg|kilograms?", "g|grams?",
         "mg|milligrams?", "lbs?|pounds?", "oz|ounces?", "m[lL]|milli(?:liter|litre)s?",
         "L|(?:liter|litre)s?", "gallons?", "s|sec|seconds?", "min|minutes?", "h|hr|hours?",
         "days?", "weeks?", "months?", "years?", "units?", "mph", "kph"]
NAME = "|".join(f"({name})(?![a-zA-Z])" for name in NAMES)
UNIT = (rf"(?:square |sq\.? |cubic )?(?:{NAME})(?:\^\{{?[23]\}}?)?"
        rf"(?:(?:/| per | / )(?:{NAME}))?(?:\^\{{?2\}}?)?")
AT_END = re.compile(rf"(?:{OPEN}\s*(?P<text>{UNIT})\.?\s*\}}(?P<power>\^\{{?[23]\}}?)?"
                    rf"|(?<![a-zA-Z\\])(?P<bare>{UNIT}))$")
VARIABLES = {"m", "g", "s", "h", "L", "in", "mi", "min", "yd"}  # units only inside \text{...}


class Answer(NamedTuple):
    text: str
    unit: str  # "" for none


# ------------------------------------------------------------------------- where an answer stands
PREFIX = re.compile(r"((?<!-)[-−]|[0-9^_√]|\\(sqrt|frac)\s*\{?|\\frac\{[^{}]*\}\{)$")
SUFFIX = re.compile(r"\s*\^|[0-9/_]|[-+*.,][0-9]")
ANCHOR = re.compile(r"(?i:\banswer\b(?:\*\*)?(?: is| are|:|=)|\b(?:correct )?(?:option|choice) is)"
                    r"[ \t:*]*")


def final_answer(text: str, reference: bool = False) -> str:
    """What the last \\boxed{...} has, or what follows the last #### or "answer is", or the last
    line; for a reference without box and #### all of it. "" for a box that never closes."""
    if (box := last_box(text)) is not None:
        return box
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0]
    if reference:
        return text
    if stated := list(ANCHOR.finditer(text)):
        line = text[stated[-1].end():].partition("\n")[0]
        return re.split(r"\.(?=\s+[A-Z]|\s*$)", line)[0]
    body = re.sub(r"(?:\$\$|\\\])\s*\.?\s*$", "", text).rstrip()  # the end of a displayed formula
    return body.splitlines()[-1] if body else ""


def last_box(text: str) -> str | None:
    """What the last \\boxed{...} has: "" if it never closes, or is part of a larger formula as in
    -\\boxed{3} or \\boxed{3}^2; None if there is no box."""
    boxes = [found.span() for found in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]
    if not boxes:
        return None
    (begin, start), depth = boxes[-1], 1
    for token in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if depth == 0:
            after = text[start + token.end():]
            whole = not (PREFIX.search(text[max(0, begin - 99):begin]) or SUFFIX.match(after))
            return text[start:start + token.start()] if whole else ""
    return ""


# -------------------------------------------------------------------------------- one spelling
def normal(text: str) -> Answer:
    """The text in one spelling, and its unit."""
    text = trim(text)  # while * is no product yet
    text = re.sub("[\u2070\u00b9\u00b2\u00b3\u2074-\u207f]+", lambda m: f"^{{{plain(m[0])}}}", text)
    text = re.sub("[\u2080-\u208e]+", lambda m: f"_{{{plain(m[0])}}}", text)
    text = "".join(map(character, text))
    text = re.sub(r"(?<!\\)\\[()\[\]]", " ", text)
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:  # around formulas; one alone is a currency
        text = re.sub(r"(?<!\\)\$", " ", text)
    text = text.replace(r"\$", "$").replace(r"\%", "%")
    text = without_separators(text)
    text = re.sub(r"(?<!\\)\\[,;: ]", " ", text).replace(r"\!", "")
    text = re.sub(r"\\[a-zA-Z]+", lambda m: SIGN.get(m[0], m[0]), text)
    text = re.sub(r"\^\s*(?:\{\s*(?:\\circ|°)\s*\}|\\circ|°)\s*", "°", text)
    text = re.sub(rf"°\s*(?:{OPEN}\s*)([CF])\s*\}}", r"°\1", text)
    text = re.sub(r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*(\{[^{}]*\})\s*([0-9])", r"\\frac\1{\2}", text)
    text = re.sub(r"\\frac\s*([0-9])\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"\\sqrt\s*([0-9])", r"\\sqrt{\1}", text)
    text = re.sub(r"√\s*([0-9.]+|[a-zπ])", r"\\sqrt{\1}", text).replace("√", r"\sqrt")
    text, unit = split_unit(trim(text))
    for _ in range(4):  # one in the other
        text = re.sub(rf"{OPEN}([^{{}}]*)\}}", r" \1 ", text)
    text = re.sub(r"\s*,?\s*(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])\s*|\s*;\s*", ",", text)
    text = re.sub(r"\s+", " ", trim(text))
    text = re.sub(r"(?<=[0-9])e (?=[+-])", "{e}", text)  # 5e - 5 is a difference, 5e-5 a number
    # a blank between letters or digits parts them; elsewhere it says nothing
    text = re.sub(r"(?<![0-9a-zA-Z]) | (?![0-9a-zA-Z])", "", text)
    text = re.sub(r"(?<=[0-9])\*10\^(?:\{(-?[0-9]+)\}|([0-9]+))", r"e\1\2", text)
    return Answer(text, unit)


def character(c: str) -> str:
    kind, compatible = unicodedata.decomposition(c).split(" ")[0], plain(c)
    if c in SIGN:
        return SIGN[c]
    if kind == "<fraction>" and "⁄" in compatible.strip("⁄"):
        return "\\frac{%s}{%s}" % tuple(compatible.split("⁄"))
    if kind in ("<wide>", "<narrow>") or c >= "\U0001d400" and kind == "<font>":
        return SIGN.get(compatible, compatible)  # but ℝ is no R
    return " " if c.isspace() else c


def plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def without_separators(text: str) -> str:
    """Numbers without their thousands separators. A comma separates thousands only outside of
    brackets: (1,234) has two coordinates."""
    text = re.sub(r"(?<![0-9.])(?<![0-9] )[1-9][0-9]{0,2}(?:(?:\{,\}|\\,|,\\!|\\ |'| )[0-9]{3})+"
                  r"(?![0-9])", lambda m: re.sub("[^0-9]", "", m[0]), text)

    def join(m):
        before = text[:m.start()]
        depth = sum(map(before.count, "([")) - sum(map(before.count, ")]")) + (
            before.count("\\{") - before.count("\\}"))
        return m[0] if depth > 0 else m[0].replace(",", "")

    return re.sub(r"(?<![0-9.,])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9]|,[0-9])", join, text)


def trim(text: str) -> str:
    """Without what stands around an answer: blanks, quotes, the stars of Markdown, a full stop.
    Three dots stay."""
    for _ in range(2):
        text = re.sub(r"^\*\*|\*\*$|(?<![.,…])[.,:]$", "", text.strip())
        text = re.sub(r"^(\"|'|`|\*)(.*)\1$", r"\2", text.strip(), flags=re.DOTALL)
    return text.strip()


def split_unit(text: str) -> tuple[str, str]:
    if currency := re.match(r"(-?)\s*([$€£])\s*(?=-?[0-9.])", text):
        return currency[1] + text[currency.end():], unit_name(currency[2])
    found = AT_END.search(text)
    if (not found or not text[:found.start()].strip() or found["bare"] in VARIABLES
            or re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text)):  # of an angle, no unit
        return text, ""
    name = found["text"] or found["bare"]
    return text[:found.start()], unit_name(name) + (found["power"] or "").strip("^{}")


def unit_name(unit: str) -> str:
    """The same for all that mean the same: the numbers of names, / and powers."""
    power = {"sq": "2", "cu": "3"}.get(unit[:2], "")
    unit = re.sub(r"^(?:square|sq\.?|cubic) ", "", unit)
    unit = unit.replace("mph", "mi/h").replace("kph", "km/h")
    unit = re.sub(NAME, lambda m: f"<{m.lastindex}>", unit).replace(" per ", "/")
    return re.sub(r"[\s^{}]", "", unit) + power

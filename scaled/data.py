"""Prompts from a file or the hub, as token ids, and the order in which training takes them."""
import random
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from itertools import takewhile
from pathlib import Path

from scaled.tables import read_columns


@dataclass(frozen=True)
class Prompt:
    id: str  # where it stands: "train.jsonl:17", rows counted from 0
    tokens: list[int]
    answer: str  # the reference; "" where the data has none


def load_prompts(source: str | Path, tokenizer, *, prompt_column: str = "prompt",
                 answer_column: str = "answer", chat: bool = True, split: str = "train",
                 max_prompt: int, system: str = "", vocabulary: int | None = None) -> list[Prompt]:
    """All prompts of `source`, as tables.py reads it. The prompt column has text, which becomes one
    user message, or lists of {role, content}; `system` is put before them. chat=False: text only,
    tokenised as it stands, with what the tokenizer puts in front of a text. answer_column "": there
    are no references. Token ids are below `vocabulary`, the model's.

    ValueError, one line, for data that cannot be read or used as it is: nothing is dropped."""
    if chat and tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template; set chat = false")
    if system and not chat:
        raise ValueError("system needs a chat template; set chat = true, or system = \"\"")
    columns = read_columns(str(source), split, [c for c in (prompt_column, answer_column) if c])
    cells = columns[prompt_column]
    name = Path(source).name if Path(source).is_file() else source
    ids = [f"{name}:{row}" for row in range(len(cells))]
    answers = ["" for _ in ids]
    if answer_column:
        answers = [reference(id, cell) for id, cell in zip(ids, columns[answer_column])]
    if chat:
        texts = [render(tokenizer, id, cell, system) for id, cell in zip(ids, cells)]
    else:
        for id, cell in zip(ids, cells):
            if not isinstance(cell, str):
                raise ValueError(f"prompt {id} is {kind(cell)}, not text; chat = false needs text")
        texts = cells
    for id, text in zip(ids, texts):
        check_text(id, text)
    # one call for all rows, which a fast tokenizer spreads over threads
    tokens = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if not chat:  # a template has written its special tokens already
        front = tokens_in_front(tokenizer)
        tokens = [row if row[:len(front)] == front else front + row for row in tokens]
    check_tokens(ids, tokens, max_prompt, vocabulary, tokenizer.eos_token_id)
    return [Prompt(*row) for row in zip(ids, tokens, answers)]


def check_text(id: str, text: str):
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"prompt {id} is no text that UTF-8 can hold: {error}") from None


def tokens_in_front(tokenizer) -> list[int]:
    """What the tokenizer puts before a text, such as <bos>. What it puts after one is for texts
    that have ended."""
    text = tokenizer("1", return_special_tokens_mask=True)
    front = takewhile(lambda pair: pair[1], zip(text["input_ids"], text["special_tokens_mask"]))
    return [token for token, _ in front]


def check_tokens(ids: list[str], tokens: list[list[int]], max_prompt: int,
                 vocabulary: int | None, end: int | None):
    """ValueError with the first prompt that the model cannot take."""
    if bad := [i for i, row in enumerate(tokens) if not 2 <= len(row) <= max_prompt]:
        raise ValueError(f"prompt {ids[bad[0]]} has {len(tokens[bad[0]])} tokens, the limits are 2 "
                         f"and max_prompt {max_prompt}; of such prompts there are {len(bad)}: "
                         "raise max_prompt or remove them")
    for id, row in zip(ids, tokens):
        if vocabulary is not None and max(row) >= vocabulary:
            raise ValueError(f"prompt {id} has the token {max(row)}, and the model's vocabulary "
                             f"{vocabulary} tokens: the tokenizer is not the checkpoint's")
        if row[-1] == end:
            raise ValueError(f"prompt {id} ends with the end-of-sequence token, so the model has "
                             "nothing to answer: remove it from the text or the template")


class PromptOrder:
    """An endless stream over n prompts: each epoch is a permutation that (seed, epoch) decides
    alone, so a resumed run has nothing to restore but its position. ValueError if n < 1."""

    def __init__(self, n: int, seed: int):
        if n < 1:
            raise ValueError(f"an order of {n} prompts: give 1 or more")
        self.n, self.seed = n, seed

    def take(self, position: int, count: int) -> list[int]:
        """Indices of the prompts position, …, position + count - 1 of the stream."""
        return [permutation(self.n, self.seed, place // self.n)[place % self.n]
                for place in range(position, position + count)]


@lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> list[int]:
    return random.Random(f"{seed} {epoch}").sample(range(n), n)


def kind(cell) -> str:
    return "missing" if cell is None else f"a {type(cell).__name__}"


def reference(id: str, cell) -> str:
    """An answer as text: .00005 is "0.00005", and 3.0 is "3", since a column that mixes 3 and 0.5
    is read as floats."""
    if isinstance(cell, str):
        if not cell.strip():
            raise ValueError(f"the answer of prompt {id} is empty; give one, or remove the row "
                             '(answer_column = "" if there are none)')
        return cell
    if not isinstance(cell, (int, Decimal)) or isinstance(cell, bool):
        raise ValueError(f"the answer of prompt {id} is {kind(cell)}; give text or a number")
    if isinstance(cell, Decimal) and not (cell.is_finite() and abs(cell.adjusted()) < 400):
        raise ValueError(f"the answer of prompt {id} is {str(cell):.40}, no number that can be "
                         "written out; give it as text")
    text = str(cell) if isinstance(cell, int) else f"{cell:f}"
    return (text.rstrip("0").rstrip(".") or "0") if "." in text else text


def render(tokenizer, id: str, cell, system: str) -> str:
    """The chat template's text of one prompt, up to where the model answers."""
    messages = [{"role": "user", "content": cell}] if isinstance(cell, str) else cell
    if not (isinstance(messages, list) and messages and all(
            isinstance(m, dict) and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str) for m in messages)):
        raise ValueError(f"prompt {id} is neither text nor a list of messages with a role and "
                         f"text as content, but {kind(cell)}")
    if system:
        if messages[0]["role"] == "system":
            raise ValueError(f"prompt {id} has its own system message; set system = \"\"")
        messages = [{"role": "system", "content": system}] + messages
    if messages[-1]["role"] not in ("user", "tool"):
        raise ValueError(f"prompt {id} ends with a message of {messages[-1]['role']!r:.40}, not of "
                         "user or tool: the model would see its answer; remove that message")
    if not messages[-1]["content"].strip():
        raise ValueError(f"prompt {id} is empty; remove the row")
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program, and may refuse some order of roles
        raise ValueError(f"the chat template refuses prompt {id}: {error}") from error


def end_tokens(folder: str, trust_remote_code: bool) -> list[int]:
    """Ids that end a response: those of the generation config, and the tokenizer's. ValueError if
    there are none, since every response would then be cut off."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    path = Path(folder)
    source = GenerationConfig if (path / "generation_config.json").exists() else AutoConfig
    trust = dict(trust_remote_code=trust_remote_code) if source is AutoConfig else {}
    config = source.from_pretrained(folder, **trust)
    ids = getattr(config, "eos_token_id", None)  # composite configurations have it further down
    if ids is None and source is AutoConfig:
        ids = getattr(config.get_text_config(), "eos_token_id", None)
    ids = {ids} if isinstance(ids, int) else set(ids or ())
    if (path / "tokenizer_config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        ids |= {tokenizer.eos_token_id} - {None}
    if not ids:
        raise ValueError(f"{folder}: no end-of-sequence token; set eos_token_id in "
                         "generation_config.json")
    return sorted(ids)

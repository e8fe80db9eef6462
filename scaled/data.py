"""Prompts from a file or the hub, as token ids, and the order in which training takes them."""
import random
import re
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True)
class Prompt:
    id: str  # where it stands: "train.jsonl:17", rows counted from 0
    tokens: list[int]
    answer: str  # the reference; "" where the data has none


def load_prompts(source: str | Path, tokenizer, *, prompt_column: str = "prompt",
                 answer_column: str = "answer", chat: bool = True, split: str = "train",
                 max_prompt: int, system: str = "") -> list[Prompt]:
    """All prompts of `source`: a .jsonl, .json or .parquet file, or the hub's "org/name" or
    "org/name:config", of which `split` is taken. The prompt column has text, which becomes one
    user message, or lists of {role, content}; `system` is put before them. chat=False: text only,
    tokenised as it stands. answer_column "": there are no references.

    ValueError, one line, for data that cannot be read or used as it is: nothing is dropped."""
    source = str(source)
    if chat and tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template; set chat = false")
    if system and not chat:
        raise ValueError("system needs a chat template; set chat = true, or system = \"\"")
    columns = read_columns(source, split, [c for c in (prompt_column, answer_column) if c])
    cells = columns[prompt_column]
    name = Path(source).name if is_file(source) else source
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
    # one call for all rows, which a fast tokenizer spreads over threads; a template has written
    # its special tokens already
    tokens = tokenizer(texts, **{"add_special_tokens": False} if chat else {})["input_ids"]
    if bad := [i for i, row in enumerate(tokens) if not 1 <= len(row) <= max_prompt]:
        raise ValueError(f"prompt {ids[bad[0]]} has {len(tokens[bad[0]])} tokens, the limits are 1 "
                         f"and max_prompt {max_prompt}; of such prompts there are {len(bad)}: "
                         "raise max_prompt or remove them")
    return [Prompt(*row) for row in zip(ids, tokens, answers)]


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


def is_file(source: str) -> bool:
    return Path(source).suffix in (".jsonl", ".json", ".parquet")


def read_columns(source: str, split: str, names: list[str]) -> dict[str, list]:
    """The named columns as Python values. ValueError for what is missing or cannot be read."""
    import datasets  # slow to import: Prompt is needed where datasets is not
    datasets.disable_progress_bars()  # one for each rank, on one console
    name, _, config = source.partition(":")
    if not is_file(source) and not re.fullmatch(r"[\w.-]+/[\w.-]+(:[^/:]+)?", source):
        raise ValueError(f"data {source!r}: give a .jsonl, .json or .parquet file, or a hub name, "
                         "org/name or org/name:config")
    if is_file(source) and not Path(source).is_file():
        raise ValueError(f"data file {source} does not exist")
    if is_file(source) and not Path(source).stat().st_size:
        raise ValueError(f"data file {source} is empty")
    with tempfile.TemporaryDirectory() as cache:  # no cache survives, so none can be stale
        try:
            # not load_dataset("json", ...): that calls home to count its uses
            if source.endswith(".parquet"):  # with the default batch size, no rows are an error
                table = datasets.Dataset.from_parquet(source, cache_dir=cache, batch_size=1000)
            elif is_file(source):
                table = datasets.Dataset.from_json(source, cache_dir=cache)
            else:
                table = datasets.load_dataset(name, config or None, split=split)
        except Exception as error:  # whatever a file or a server can do; datasets hides the cause
            reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
            if "corresponds to no data" in reason:
                raise ValueError(f"data {source} has no rows") from error
            raise ValueError(f"data {source} cannot be read: {reason}") from error
        if not len(table):
            raise ValueError(f"data {source} has no rows")
        for column in names:
            if column not in table.column_names:
                raise ValueError(f"data {source} has no column {column!r}, only "
                                 f"{', '.join(table.column_names)}: set prompt_column and "
                                 'answer_column (answer_column = "" if there is none)')
        return {column: table[column][:] for column in names}


def kind(cell) -> str:
    return "missing" if cell is None else f"a {type(cell).__name__}"


def reference(id: str, cell) -> str:
    """An answer as text. 3.0 becomes "3": a column that mixes 3 and 0.5 is read as floats."""
    if isinstance(cell, str):
        return cell
    if not isinstance(cell, (int, float)) or isinstance(cell, bool):
        # a trap: the JSON reader takes a column of text that looks like dates for dates
        raise ValueError(f"the answer of prompt {id} is {kind(cell)}; give text or a number "
                         "(text that a JSON reader takes for a date: use Parquet)")
    if isinstance(cell, float) and not abs(cell) < 2**53:
        raise ValueError(f"the answer of prompt {id} is {cell}, which a float does not hold "
                         "exactly; give it as text")
    return str(int(cell) if cell == int(cell) else cell)


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

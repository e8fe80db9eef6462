"""Prompts through the real `datasets` and a real tokenizer, and every refusal."""
import csv
import gzip
import io
import json
import os
import socket
from decimal import Decimal
from pathlib import Path

import pytest

os.environ["HF_DATASETS_OFFLINE"] = "1"  # before datasets is first imported

import numpy as np
import pyarrow
import pyarrow.parquet
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from scaled.data import Prompt, load_prompts

WORDS = "<bos> <unk> [system] [user] [assistant] be brief what is two plus three five hello".split()
TEMPLATE = ("<bos>{% for m in messages %} [{{ m.role }}] {{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %} [assistant]{% endif %}")


@pytest.fixture
def tokenizer():
    """One token a word, <bos> in front by default."""
    base = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    base.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=base, bos_token="<bos>", unk_token="<unk>",
                                   chat_template=TEMPLATE)


@pytest.fixture(autouse=True)
def calls(monkeypatch, tmp_path):
    """No test may reach for the network; the list has who tried. Nor may one find a cache."""
    import datasets
    tried = []

    def refuse(*address, **options):
        tried.append(address)
        raise OSError("the tests have no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tried


def write(path, rows):
    """Rows as the file or folder that the name asks for."""
    import datasets
    text = io.StringIO(newline="")
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return str(path)
    if not path.suffix:
        table = datasets.Dataset.from_list(rows)
        (datasets.DatasetDict(train=table) if "splits" in path.name else table).save_to_disk(path)
        return str(path)
    if ".csv" in path.suffixes:
        table = csv.DictWriter(text, rows[0])
        table.writeheader(), table.writerows(rows)
    elif ".json" in path.suffixes:
        json.dump(rows, text)
    else:
        text.write("".join(json.dumps(row) + "\n" for row in rows))
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def ids(text):
    return [WORDS.index(word) for word in text.split()]


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet"])
def test_text_becomes_a_user_message(tmp_path, tokenizer, name):
    source = write(tmp_path / name, [{"prompt": "what is two", "answer": "2", "other": 0},
                                     {"prompt": "hello", "answer": "five", "other": 0},
                                     {"prompt": "three plus two", "answer": "5", "other": 0}])
    assert load_prompts(source, tokenizer, max_prompt=6) == [
        Prompt(f"{name}:0", ids("<bos> [user] what is two [assistant]"), "2"),
        Prompt(f"{name}:1", ids("<bos> [user] hello [assistant]"), "five"),
        Prompt(f"{name}:2", ids("<bos> [user] three plus two [assistant]"), "5")]
    briefly = load_prompts(source, tokenizer, max_prompt=9, system="be brief")
    assert briefly[1].tokens == ids("<bos> [system] be brief [user] hello [assistant]")


@pytest.mark.parametrize("name", ["talk.jsonl", "talk.parquet"])
def test_messages_and_column_names(tmp_path, tokenizer, name):
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is two"},
            {"role": "assistant", "content": "two is two"}, {"role": "user", "content": "plus"}]
    source = write(tmp_path / name, [{"talk": talk[1:2], "truth": 7}, {"talk": talk, "truth": 12}])
    options = {"prompt_column": "talk", "max_prompt": 99}
    prompts = load_prompts(source, tokenizer, answer_column="truth", **options)
    assert prompts[0].tokens == ids("<bos> [user] what is two [assistant]")
    assert prompts[1].tokens == ids("<bos> [system] be brief [user] what is two [assistant] "
                                    "two is two [user] plus [assistant]")
    assert [p.answer for p in prompts] == ["7", "12"]
    assert [p.answer for p in load_prompts(source, tokenizer, answer_column="", **options)] == [
        "", ""]


def test_without_chat_the_text_is_tokenised_as_it_stands(tmp_path, tokenizer):
    tokenizer.chat_template = None
    texts = ["two plus three", "[user] hello", "<bos> two plus", "two <bos> three"]
    source = write(tmp_path / "a.jsonl", [{"prompt": text} for text in texts])
    expected = [ids(text if text.startswith("<bos>") else f"<bos> {text}") for text in texts]
    for template in ("<bos> $A", "<bos> $A [assistant]", "$A [assistant]", "<bos> <unk> $A"):
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<bos>", 0), ("[assistant]", 4), ("<unk>", 1)])
        prompts = load_prompts(source, tokenizer, chat=False, answer_column="", max_prompt=5)
        front = template[:template.index("$")]
        assert [p.tokens for p in prompts] == [
            ids(text if text.startswith(front) else front + text) for text in texts]
        if template == "<bos> $A":
            assert [p.tokens for p in prompts] == expected
            assert prompts[0].tokens == tokenizer.encode(texts[0])


@pytest.mark.parametrize("rows, answers", [
    ([3, -14], ["3", "-14"]), ([3, 0.5], ["3", "0.5"]), ([3.0, 100.0, -0.0], ["3", "100", "-0"]),
    ([0.00005, 1e-5, 2e5], ["0.00005", "0.00001", "200000"]), ([2**53 + 1, 0], ["9007199254740993", "0"]),
    ([10**30 + 1], [str(10**30 + 1)]), (["3", 4, 0.25], ["3", "4", "0.25"]),
    (["1,234", " x "], ["1,234", " x "]), (["2020-01-01", "5e-05"], ["2020-01-01", "5e-05"])])
def test_answers_that_are_numbers(tmp_path, tokenizer, rows, answers):
    source = write(tmp_path / "a.jsonl", [{"prompt": "hello", "answer": row} for row in rows])
    assert [p.answer for p in load_prompts(source, tokenizer, max_prompt=9)] == answers


@pytest.mark.parametrize("type, numbers, answers", [
    (pyarrow.float32(), [0.1, 5e-05, 3.0, 1 / 3], ["0.1", "0.00005", "3", "0.33333334"]),
    (pyarrow.float16(), [0.1, 2.0], ["0.1", "2"]), (pyarrow.float64(), [0.1, 1e-7], ["0.1", "0.0000001"]),
    (pyarrow.decimal128(9, 3), [Decimal("0.100"), Decimal("7")], ["0.1", "7"]), (pyarrow.int8(), [7], ["7"])])
def test_a_columns_precision_is_no_part_of_its_numbers(tmp_path, tokenizer, type, numbers, answers):
    values = pyarrow.array(np.array(numbers, np.float16) if type == pyarrow.float16() else numbers, type)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["hello"] * len(numbers), "answer": values}), path)
    assert [p.answer for p in load_prompts(path, tokenizer, max_prompt=9)] == answers
    deep = pyarrow.StructArray.from_arrays([values], ["truth"])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["hello"] * len(numbers), "model": deep}), path)
    assert [p.answer for p in load_prompts(path, tokenizer, answer_column="model.truth", max_prompt=9)] == answers


FORMATS = ["train.jsonl", "train.jsonl.gz", "train.json", "train.json.gz", "train.csv", "train.csv.gz",
           "train.parquet", "saved", "saved_splits"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_the_same_prompts(tmp_path, tokenizer, calls, monkeypatch, name):
    """Without a request to anyone, under a name that could be one of the hub."""
    import datasets
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "what is two", "answer": "007"}, {"prompt": 'three,\n"plus" two', "answer": "0.10"},
            {"prompt": "hello", "answer": "NA"}]
    Path("data").mkdir()
    source = write(Path("data", name), rows)
    prompts = load_prompts(source, tokenizer, max_prompt=9)
    assert [p.answer for p in prompts] == ["007", "0.10", "NA"]
    assert prompts[0].tokens == ids("<bos> [user] what is two [assistant]")
    assert prompts[1].tokens[2] == WORDS.index("<unk>") and len(prompts[1].tokens) == 6
    assert [p.id for p in prompts] == [f"{source if 'saved' in name else name}:{row}" for row in range(3)]
    assert calls == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_a_field_of_a_column(tmp_path, tokenizer, name):
    rows = [{"prompt": "hello", "reward_model": {"ground_truth": "5", "style": {"deep": 0.25}}, "a.b": "1"}] * 2
    source = write(tmp_path / name, rows)
    for column, answer in [("reward_model.ground_truth", "5"), ("reward_model.style.deep", "0.25"), ("a.b", "1")]:
        assert load_prompts(source, tokenizer, answer_column=column, max_prompt=9)[1].answer == answer
    for column in ("reward_model.truth", "reward_model.ground_truth.x", "b.ground_truth", "reward_model"):
        with pytest.raises(ValueError, match=f"no column '{column}'|answer of prompt {name}:0 is (missing|a dict)"):
            load_prompts(source, tokenizer, answer_column=column, max_prompt=9)


def test_columns_that_nobody_asked_for_do_no_harm_at_any_size(tmp_path, tokenizer):
    """12 MB, in the last line of which another column has another type."""
    rows = [{"prompt": "hello", "answer": str(i), "other": i, "filler": "x" * 1000} for i in range(12_000)]
    source = write(tmp_path / "a.jsonl", rows + [{"prompt": "two", "answer": 7, "other": {"a": []}}])
    prompts = load_prompts(source, tokenizer, max_prompt=9)
    assert [p.answer for p in prompts] == [*map(str, range(12_000)), "7"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_what_only_some_readers_take_for_the_end_of_a_line_or_a_number(tmp_path, tokenizer, name):
    rows = [{"prompt": "hello", "answer": "a\u2028b\x85c\x0bd", "other": 0},
            {"prompt": "two", "answer": "7", "other": 1}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows).replace("\x0b", "\\u000b")
    (tmp_path / name).write_bytes(text.replace('"other": 1', '"other": ' + "9" * 5000).encode())
    assert [p.answer for p in load_prompts(tmp_path / name, tokenizer, max_prompt=9)] == [rows[0]["answer"], "7"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_file_needs_no_network_and_leaves_no_cache(tmp_path, tokenizer, calls, monkeypatch, name):
    import datasets
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    path, texts = tmp_path / name, []
    for word in ("three", "hello"):  # of the same length, so size and time say nothing
        write(path, [{"prompt": word, "answer": "1"}])
        os.utime(path, (1e9, 1e9))
        texts += [load_prompts(str(path), tokenizer, max_prompt=9)[0].tokens]
    assert texts == [ids(f"<bos> [user] {word} [assistant]") for word in ("three", "hello")]
    assert calls == [] and [p.name for p in tmp_path.iterdir()] == [name]


def test_a_hub_name_with_configurations_and_splits(tmp_path, tokenizer, monkeypatch, calls):
    """A folder of that name stands in for the hub: datasets reads both by the same code."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "acme" / "sums"
    folder.mkdir(parents=True)
    files = "".join(f"- config_name: {config}\n  data_files:\n" + "".join(
        f"  - split: {split}\n    path: {config}-{split}.jsonl\n" for split in ("train", "test"))
        for config in ("short", "long"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    words = iter(("two", "three", "five", "hello"))
    for config in ("short", "long"):
        for split in ("train", "test"):
            write(folder / f"{config}-{split}.jsonl", [{"prompt": next(words), "answer": 0}])

    def load(source, split="train"):
        return load_prompts(source, tokenizer, split=split, max_prompt=9)[0]

    assert load("acme/sums:short").tokens == ids("<bos> [user] two [assistant]")
    assert load("acme/sums:long").id == "acme/sums:long:0"
    assert load("acme/sums:long", split="test").tokens == ids("<bos> [user] hello [assistant]")
    for source, split, reason in [("acme/sums", "train", "Config name is missing.*short"),
                                  ("acme/sums:tall", "train", "tall"),
                                  ("acme/sums:long", "dev", "dev.*train.*test"),
                                  ("acme/none", "train", "acme/none")]:
        with pytest.raises(ValueError, match=f"^data {source} cannot be read: .*{reason}"):
            load(source, split=split)
    assert calls == []


ROW = '{"prompt": "hello", "answer": "1"}\n'
REFUSALS = [  # name, content, options, message
    ("none.jsonl", None, {}, "does not exist"),
    ("empty.jsonl", "", {}, "is empty"),
    ("blank.jsonl", "\n\n", {}, "has no rows"),
    ("objects.jsonl", "{}\n{}\n", {}, "has no column 'prompt'"),
    ("rows.csv", "prompt,answer\n", {}, "has no rows"),
    ("list.json", "[]", {}, "has no rows"),
    ("list.json", "[1]", {}, "entry 0 is no object"),
    ("list.jsonl", ROW + "[1]\n", {}, "line 1, counted from 0, is no JSON object"),
    ("short.csv", "prompt,answer\nhello,1\nhello\n", {}, "row 1, .*cells"),
    ("long.csv", "prompt,answer\nhello,1,2\n", {}, "row 0, .*cells"),
    ("twice.csv", "prompt,answer,answer\nhello,1,2\n", {}, r"no column 'answer', only prompt, answer \(twice\)"),
    ("a.jsonl", ROW + '{"prompt": "hello", "answer": "1", "other": ' + "[" * 10**5, {}, "line 1, .*recursion"),
    ("a.jsonl", ROW + '{"prompt": "hello", "answer": ' + "9" * 5000 + "}", {}, "answer of prompt a.jsonl:1 is 9"),
    ("empty.csv", "prompt,answer\nhello,1\nhello,\n", {}, "answer of prompt empty.csv:1 is empty"),
    ("fake.jsonl.gz", "hello", {}, "cannot be read: .*gzip"),
    ("bytes.jsonl", b'{"prompt": "\xff"}', {}, "cannot be read: .*utf-8"),
    ("none.csv", None, {}, "does not exist"), ("none.jsonl.gz", None, {}, "does not exist"),
    ("train.txt", ROW, {}, "give a .jsonl, .json, .csv"), ("a.parquet.gz", ROW, {}, "give a .jsonl"),
    ("a.jsonl", ROW * 40 + '{"prompt": "hello", "answer": " "}\n', {}, "answer of prompt a.jsonl:40 is empty"),
    ("a.jsonl", ROW + '{"prompt": " ", "answer": "1"}\n', {}, "prompt a.jsonl:1 is empty"),
    ("a.jsonl", ROW + '{"prompt": "\\ud800", "answer": "1"}\n', {}, "prompt a.jsonl:1 is no text"),
    ("a.jsonl", ROW + '{"prompt": "hello", "answer": NaN}\n', {}, "answer of prompt a.jsonl:1 is a float"),
    ("a.jsonl", ROW + '{"prompt": "hello", "answer": 1e999999999}\n', {}, "answer of prompt a.jsonl:1 is 1"),
    ("a.jsonl", '{"prompt": "five", "answer": "1"}\n' + ROW, {"vocabulary": 13},
     "prompt a.jsonl:1 has the token 13, .*vocabulary 13 tokens"),
    ("a.jsonl", ROW + '{"prompt": "hello two", "answer": "1"}\n', {"chat": False, "max_prompt": 2},
     "a.jsonl:0 has 1 tokens, the limits are 2"),
    ("a.jsonl", ROW + json.dumps({"prompt": [{"role": "user", "content": "hello"}, {
        "role": "assistant", "content": "five"}], "answer": 5}), {},
     "prompt a.jsonl:1 ends with a message of 'assistant', .*see its answer"),
    ("rows.parquet", [], {}, "has no rows"),
    ("broken.jsonl", ROW + '{"prompt": ', {}, "cannot be read: line 1, .*JSON"),
    ("text.jsonl", "hello\n", {}, "cannot be read: .*JSON"),
    ("fake.parquet", "hello\n", {}, "cannot be read: .*[Pp]arquet"),
    ("a.jsonl", ROW, {"prompt_column": "question"}, "no column 'question', only prompt, answer: "
                                                    "set prompt_column"),
    ("a.jsonl", ROW, {"answer_column": "truth"}, "no column 'truth', only prompt, answer"),
    ("a.jsonl", ROW + '{"prompt": "hello", "answer": null}\n', {}, "answer of prompt a.jsonl:1 is "
                                                                   "missing"),
    ("a.jsonl", '{"prompt": "hello", "answer": [1]}\n', {}, "prompt a.jsonl:0 is a list"),
    ("a.jsonl", '{"prompt": "hello", "answer": true}\n', {}, "prompt a.jsonl:0 is a bool"),
    ("big.parquet", [{"prompt": "hello", "answer": 1.0}, {"prompt": "hello", "answer": 2.0**53}], {},
     "row 1 has 9.*exactly; give it as text"),
    ("a.parquet", [{"prompt": "hello", "answer": float("nan")}], {}, "a.parquet:0 is NaN"),
    ("a.jsonl", '{"prompt": null, "answer": "1"}\n', {}, "prompt a.jsonl:0 is .*missing"),
    ("a.jsonl", '{"prompt": [], "answer": "1"}\n', {}, "prompt a.jsonl:0 is neither text nor"),
    ("a.jsonl", '{"prompt": [{"role": "user"}], "answer": "1"}\n', {}, "neither text nor"),
    ("a.jsonl", '{"prompt": [{"role": "user", "content": [1]}], "answer": "1"}\n', {}, "neither"),
    ("a.jsonl", '{"prompt": [{"role": "user", "content": "hello"}], "answer": "1"}\n',
     {"chat": False}, "prompt a.jsonl:0 is a list, not text"),
    ("a.jsonl", '{"prompt": [{"role": "system", "content": "hello"}], "answer": "1"}\n',
     {"system": "be brief"}, "prompt a.jsonl:0 has its own system message"),
    ("a.jsonl", ROW, {"system": "be brief", "chat": False}, "system needs a chat template"),
    ("a.jsonl", ROW + ROW + '{"prompt": "two plus three"}\n' * 2, {
        "answer_column": "", "max_prompt": 5},
     "prompt a.jsonl:2 has 6 tokens, .*max_prompt 5; .* there are 2"),
    ("a.jsonl", ROW + '{"prompt": "", "answer": "1"}\n', {"chat": False}, "a.jsonl:0 has 1 tokens"),
    ("a.csv", ROW * 2, {}, "no column 'prompt'"),
]


@pytest.mark.parametrize("name, content, options, message", REFUSALS)
def test_refusals_are_one_line(tmp_path, tokenizer, monkeypatch, name, content, options, message):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, list):
        schema = pyarrow.schema({"prompt": pyarrow.string(), "answer": pyarrow.float64()})
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content, schema), name)
    elif content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if options.get("chat") is False:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    with pytest.raises(ValueError, match=message) as refusal:
        load_prompts(name, tokenizer, **{"max_prompt": 9} | options)
    assert "\n" not in str(refusal.value)


def test_a_template_can_be_missing_or_refuse(tmp_path, tokenizer):
    source = write(tmp_path / "a.jsonl", [{"prompt": "hello", "answer": 1}] * 3 + [
        {"prompt": "five", "answer": 1}])
    tokenizer.chat_template = ("{% if messages[0].content == 'five' %}{{ raise_exception('no five')"
                               " }}{% endif %}" + TEMPLATE)
    with pytest.raises(ValueError, match="refuses prompt a.jsonl:3: no five"):
        load_prompts(source, tokenizer, max_prompt=9)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template; set chat = false"):
        load_prompts(source, tokenizer, max_prompt=9)

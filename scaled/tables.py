"""Columns of a file, of a folder of `datasets`, or of a data set on the hub. Only the columns that
are asked for become values, so that no other column can do harm."""
import csv
import gzip
import json
import re
import sys
from decimal import Decimal
from pathlib import Path

HUB = re.compile(r"[\w.-]+/[\w.-]+(:[^/:]+)?")
FILES = (".jsonl", ".json", ".csv", ".parquet")
GIVE = ("give a .jsonl, .json, .csv (each also as .gz) or .parquet file, a folder of save_to_disk, "
        "or a hub name, org/name or org/name:config")


def read_columns(source: str, split: str, names: list[str]) -> dict[str, list]:
    """The named columns as Python values, with Decimal for numbers that are not whole: as text, .1
    stays .1. "a.b" is the field b in the column a, unless a column has that name. What exists
    locally is never looked up on the hub; `split` is for what has splits.

    ValueError, in one line, for what is missing or cannot be read."""
    path = Path(source)
    suffix = Path(path.stem if path.suffix == ".gz" else path.name).suffix
    if not path.exists() and (suffix in FILES or path.suffix == ".gz"):
        raise ValueError(f"data file {source} does not exist")
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"data file {source} is empty")
    try:
        if path.is_file() and suffix in (".jsonl", ".json", ".csv"):
            read = {".jsonl": json_lines, ".json": json_list, ".csv": csv_rows}[suffix]
            unpack = gzip.open if path.suffix == ".gz" else open
            with unpack(path, "rt", encoding="utf-8-sig", newline="") as file:
                columns = of_rows(list(read(file)), names)
        elif path.is_file() and suffix == ".parquet" and path.suffix == ".parquet":
            columns = parquet(path, names)
        elif path.is_dir() or not path.exists() and HUB.fullmatch(source):
            columns = data_set(source, split, names)
        else:
            columns = None
    except Missing as missing:
        raise ValueError(f"data {source} has no column {missing}: set prompt_column and "
                         'answer_column (answer_column = "" if there is none)') from None
    except Exception as error:  # whatever a file or a server can do; datasets hides the cause
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise ValueError(f"data {source} cannot be read: {reason:.500}") from error
    if columns is None:
        raise ValueError(f"data {source!r}: {GIVE}")
    if not all(map(len, columns.values())):
        raise ValueError(f"data {source} has no rows")
    return columns


class Missing(Exception):
    def __init__(self, name: str, names):
        super().__init__(f"{name!r}, only {', '.join(map(str, names)):.200}")


# ----------------------------------------------------------------------------------------- text
def json_lines(file):
    for number, line in enumerate(file):
        if line.strip():
            yield an_object(line, f"line {number}")


def json_list(file):
    """A list of objects, or, as some files of this name are, an object a line."""
    text = file.read()
    try:
        rows = from_json(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        return list(json_lines(text.split("\n")))  # splitlines() also parts texts
    rows = rows if isinstance(rows, list) else [rows]
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"entry {number} is no object")
    return rows


def from_json(text: str):
    """With Decimal for what an int refuses, too: Python reads at most 4,300 digits."""
    return json.loads(text, parse_float=Decimal,
                      parse_int=lambda digits: (int if len(digits) < 4000 else Decimal)(digits))


def an_object(line: str, where: str) -> dict:
    try:
        row = from_json(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}, counted from 0, is no JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}, counted from 0, is no JSON object")
    return row


def csv_rows(file):
    csv.field_size_limit(sys.maxsize)
    rows = csv.DictReader(file, strict=True)
    header = rows.fieldnames or []
    rows.fieldnames = [f"{name} (twice)" if header.count(name) > 1 else name for name in header]
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise ValueError(f"row {number}, counted from 0, has other cells than the first line")
        yield row


def of_rows(rows: list[dict], names: list[str]) -> dict[str, list]:
    """A row may lack a column, but not all of them."""
    for name in names if rows else ():
        if not any(name in row or name.split(".")[0] in row for row in rows):
            raise Missing(name, dict.fromkeys(key for row in rows for key in row))
    return {name: [row[name] if name in row else field(row, name.split(".")) for row in rows]
            for name in names}


def field(value, names: list[str]):
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


# ---------------------------------------------------------------------------------------- Arrow
def parquet(path: Path, names: list[str]) -> dict[str, list]:
    from pyarrow.parquet import ParquetFile
    file = ParquetFile(path)
    return of_table(lambda columns: file.read(columns=columns), file.schema_arrow.names, names)


def data_set(source: str, split: str, names: list[str]) -> dict[str, list]:
    import datasets
    datasets.disable_progress_bars()  # one for each rank, on one console
    folder = Path(source)
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        table = datasets.load_from_disk(source)
        if isinstance(table, datasets.DatasetDict):
            if split not in table:
                raise ValueError(f"there is no split {split}, only {', '.join(table)}")
            table = table[split]
    else:
        name, _, config = source.partition(":")
        table = datasets.load_dataset(name, config or None, split=split)
    return of_table(lambda columns: table.select_columns(columns).with_format("arrow")[:],
                    table.column_names, names)


def of_table(read, known: list[str], names: list[str]) -> dict[str, list]:
    import pyarrow.compute
    columns = {}
    for name in names:
        first, *inner = [name] if name in known else name.split(".")
        if first not in known:
            raise Missing(name, known)
        column = read([first])[first]
        for part in inner:
            if not pyarrow.types.is_struct(column.type) or column.type.get_field_index(part) < 0:
                raise Missing(name, known)
            column = pyarrow.compute.struct_field(column, part)
        columns[name] = values(column)
    return columns


def values(column) -> list:
    """A float32 of .1 is .1, not .10000000149011612. ValueError where a float may have lost digits
    of a whole number."""
    import numpy
    import pyarrow
    if not pyarrow.types.is_floating(column.type):
        return column.to_pylist()
    of_precision = numpy.dtype(column.type.to_pandas_dtype()).type
    numbers = [None if x is None else of_precision(x) for x in column.to_pylist()]
    exact = 2 ** (numpy.finfo(of_precision).nmant + 1)
    for row, number in enumerate(numbers):
        if number is not None and exact <= abs(number) < numpy.inf:
            raise ValueError(f"row {row} has {number}, which a float does not hold exactly; give "
                             "it as text")
    return [None if x is None else Decimal(str(x)) for x in numbers]

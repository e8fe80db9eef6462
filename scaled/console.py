"""Rows of metrics for people: as many columns as a terminal has room for, and warnings in words."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean


@dataclass(frozen=True)
class Column:
    title: str
    format: str
    value: str | Callable[[dict], float | None]  # a name of metrics.jsonl, or what to make of a row
    room: int = 0  # characters of a value, where they can be more than the title has

    def cell(self, row: dict) -> str:
        value = self.value(row) if callable(self.value) else row[self.value]
        texts = [""] if value is None else [format(value, f) for f in (self.format, ".1f", ".0e")]
        fits = (text for text in texts if len(text) <= self.width)
        return next(fits, texts[-1]).rjust(self.width)

    width = property(lambda self: max(len(self.title), self.room))


def agreed(row: dict) -> float | None:
    """Mean over layers; None for a family whose routers are not known."""
    return mean(row["routing_agreement"]) if row["routing_agreement"] else None


# The first twelve fit 80 columns. KL(μ‖π) is between engines, stale is KL(π_old‖π_θ), F(2) the part
# of tokens with π_old/μ_old above 2 or below 1/2; equal: of groups without a gradient; cut: of
# responses that were cut off; seconds are an update's.
COLUMNS = [
    Column("update", ".0f", "update"), Column("score", ".3f", "score", 6),
    Column("reward", ".3f", "reward"), Column("equal", ".3f", "equal_groups"),
    Column("norm", ".3f", "grad_norm", 5), Column("entropy", ".3f", "entropy"),
    Column("KL(μ‖π)", ".1e", "mismatch_kl"), Column("stale", ".1e", "staleness_kl", 7),
    Column("clip", ".4f", "clip_fraction", 6), Column("agree", ".3f", agreed),
    Column("cut", ".2f", "truncation_rate", 4), Column("sec", ".1f", "seconds", 5),
    Column("rollout", ".1f", "rollout_seconds"), Column("train", ".1f", "train_seconds"),
    Column("sync", ".1f", "sync_seconds", 5), Column("length", ".0f", "response_length"),
    Column("F(2)", ".1e", "extreme_token_fraction", 7),
    Column("sync |Δ|", ".1e", "sync_difference"),
    Column("tokens/s", ".0f", "tokens_per_second_per_device"),
    Column("GiB", ".1f", "peak_memory_gib", 5),
    Column("sample size", ".3f", "effective_sample_size"),
]


class Table:
    """Of so many columns of a terminal, at least 80."""

    def __init__(self, width: int):
        self.columns, room = [], max(width, 80) + 1
        for column in COLUMNS:
            room -= column.width + 1
            if room < 0:
                break
            self.columns.append(column)

    def header(self) -> str:
        return " ".join(f"{column.title:>{column.width}}" for column in self.columns)

    def lines(self, row: dict) -> list[str]:
        """The row, and a line for each warning."""
        return [" ".join(column.cell(row) for column in self.columns)] + [
            f"       {warning}" for warning in warnings(row)]


def warnings(row: dict) -> list[str]:
    """What a row of numbers hides, in words."""
    said = []
    if row["equal_groups"] == 1:
        said.append("all rewards equal: no gradient")
    for name, what in (("reward_errors", "responses got 0 for an error of the reward"),
                       ("reward_timeouts", "responses got 0 for the reward's time limit"),
                       ("stale_responses", "responses were too old to train on"),
                       ("missing_routes", "pairs of token and layer have no route")):
        if row[name]:
            said.append(f"{row[name]} {what}")
    return said

"""Kills at random moments, the same as the long soak, with fewer of them."""
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from soak import soak  # noqa: E402


def test_a_run_survives_five_kills_with_equal_metrics(tmp_path):
    found = soak(tmp_path, 5, seed=1)  # which compares with a run that nobody kills
    assert [row["kill"] for row in found] == [1, 2, 3, 4, 5]
    versions = [row["version"] for row in found]
    assert versions == sorted(versions) and versions[-1] > 0  # nothing that was saved is lost

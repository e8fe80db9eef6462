"""What a run says: columns that fit, warnings in words, files that a resumed run goes on with."""
import json
import math

import pytest
import torch

import nano_moe_rl as nano
from scaled.config import Config
from scaled.console import COLUMNS, Table
from scaled.folder import cut_back
from scaled.log import PAUSE, Log, drawable, scalars
from scaled.metrics import equal_groups

C = Config(checkpoint="c", train_data="d", mini_batches=2, updates=4, eval_every=2)
ROW = {column.value: 0.5 for column in COLUMNS if isinstance(column.value, str)} | {
    "update": 3, "routing_agreement": [0.5, 1.0], "score": None, "sync_difference": None, "score_errors": None,
    "reward_errors": 0, "reward_timeouts": 0, "stale_responses": 0, "missing_routes": 0}

SHARES = ("clip_fraction", "truncation_rate", "equal_groups", "extreme_token_fraction")


def test_groups_with_equal_rewards_have_no_advantage():
    rewards = torch.randint(2, (600,), generator=torch.Generator().manual_seed(0)).double()
    for G in (2, 3, 4):
        flat = [not any(group) for group in nano.group_advantages(rewards, G).view(-1, G).tolist()]
        assert equal_groups(rewards, G) == sum(flat) / len(flat) and 0 < sum(flat) < len(flat)
    third = torch.tensor([0.1, 0.1, 0.1])  # whose mean is not 0.1 in fp32
    assert equal_groups(third, 3) == 1


# ------------------------------------------------------------------------------------- The console
@pytest.mark.parametrize("width", [40, 80, 99, 100, 150, 500])
def test_rows_fit_whatever_their_numbers_are(width):
    """Also at the sizes that a run of weeks, a reward in the thousands or a divergence has."""
    table = Table(width)
    room = max(width, 80)
    for scale in (0.0, 1e-9, 0.5, 1.0, 12.3, 1234.5, 1e6, math.inf, math.nan):
        for sign in (1, -1):
            row = {name: min(scale, 1.0) if name in SHARES else scale if isinstance(x, float) else x
                   for name, x in ROW.items()}
            line, *_ = table.lines(row | {"update": 123456, "score": sign * scale, "reward": sign * scale})
            assert len(line) == len(table.header()) <= room, (scale, line)


def test_the_columns_are_the_first_that_fit():
    titles = [Table(width).header().split() for width in (80, 100, 1000)]
    assert titles[0] == ["update", "score", "reward", "equal", "norm", "entropy", "KL(μ‖π)", "stale", "clip", "agree",
                         "cut", "sec"]
    assert titles[1] == titles[2][:15] and len(titles[2]) == len(COLUMNS) + 2  # two titles have two words
    line, = Table(80).lines(ROW | {"score": 0.25, "clip_fraction": 0.0006, "mismatch_kl": 4.14e-5})
    assert line.split() == ["3", "0.250", "0.500", "0.500", "0.500", "0.500", "4.1e-05", "5.0e-01", "0.0006", "0.750",
                            "0.50", "0.5"]
    blank, = Table(80).lines(ROW | {"routing_agreement": None})
    assert len(blank.split()) == 10  # neither a score nor an agreement


@pytest.mark.parametrize("changes, words", [
    ({"equal_groups": 1.0}, ["all rewards equal: no gradient"]), ({"equal_groups": 0.999}, []),
    ({"reward_errors": 2}, ["2 responses got 0 for an error of the reward"]),
    ({"stale_responses": 5}, ["5 responses were too old to train on"]),
    ({"reward_timeouts": 1, "missing_routes": 7}, ["1 responses got 0 for the reward's time limit",
                                                   "7 pairs of token and layer have no route"])])
def test_what_numbers_hide_is_said_in_words(changes, words):
    assert [line.strip() for line in Table(80).lines(ROW | changes)[1:]] == words


# ------------------------------------------------------------------------------------- The files
def test_row_0_is_written_once_and_a_checkpoint_keeps_it(tmp_path):
    scores = {"score": 0.25, "score_errors": 0, "sync_difference": 1e-3}
    log = Log(C, tmp_path, "", 0, silent=False)
    log.begin(scores, 0, [{"version": 0}])
    log.add([ROW | {"update": 1}, ROW | {"update": 2}], [])
    kept = log.lines
    log.add([ROW | {"update": 3}, ROW | {"update": 4}], [{"version": 2}])
    resumed = Log(C, tmp_path, kept, 2, silent=False)
    resumed.begin(scores | {"score": 0.5}, 2, [])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [0, 1, 2] and rows[0] == {"update": 0} | scores
    assert (tmp_path / "samples.jsonl").read_text() == '{"update": 0, "version": 0}\n'
    resumed.add([ROW | {"update": 3}, ROW | {"update": 4}], [{"version": 2}])
    assert [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == [
        {"update": 0, "version": 0}, {"update": 4, "version": 2}]
    again = Log(C, tmp_path, '{"update": 0}\n', 0, silent=False)  # stopped before the first update
    again.begin(scores, 0, [{"version": 0}])
    assert again.lines == '{"update": 0}\n' and len((tmp_path / "samples.jsonl").read_text().splitlines()) == 1


def test_rows_of_later_updates_and_what_is_no_row_are_cut(tmp_path):
    good = ['{"update": 0, "prompt": "a\\u2028b"}', '{"update": 4, "prompt": "\u2028"}']
    bad = ['{"update": 5}', "", "null", "[1]", '{"update": "2"}', '{"update": null}', '{"up', "3", '{"update": 1',
           "[" * 100_000]
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join([good[0], *bad, good[1]]))
    cut_back(path, 4)
    assert path.read_text() == "".join(f"{line}\n" for line in good)
    cut_back(tmp_path / "absent", 4)
    assert [entry.name for entry in tmp_path.iterdir()] == ["samples.jsonl"]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    log = Log(C, tmp_path, "", 0, silent=False)
    for name in ("samples.jsonl", "curves.png", "metrics.jsonl"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).mkdir()
        with pytest.raises(OSError, match=f"{name} could not be written: Is a directory"):
            log.draw(last=True) if name == "curves.png" else log.write([ROW], [{}])
        (tmp_path / name).rmdir()


def test_the_picture_is_drawn_from_rows_of_both_kinds_and_of_many_layers(tmp_path):
    single = {"update": 1, "score": 0.5, "engine_score": 0.4, "reward": 0.5, "mismatch_kl": 1e-3, "entropy": 1.0,
              "staleness_kl": 0.0, "routing_agreement": [0.9, 0.8]}
    assert drawable([single]) == [single]
    ours = ROW | {"staleness_kl": 9e-16, "routing_agreement": [0.25] * 24 + [0.75] * 24}
    row, = drawable([ours])
    assert "score" not in row and "sync_difference" not in row
    assert row["staleness_kl"] == 0 and row["mismatch_kl"] == 0.5
    assert row["routing_agreement"] == [0.25] * 24 + [0.75] * 24
    log = Log(C, tmp_path, json.dumps(ours) + "\n", 3, silent=False)
    log.draw()  # too soon
    assert not (tmp_path / "curves.png").exists()
    log.drawn -= PAUSE
    log.draw()
    drawn = (tmp_path / "curves.png").stat().st_mtime_ns
    log.draw()
    assert (tmp_path / "curves.png").stat().st_mtime_ns == drawn
    log.close()
    assert (tmp_path / "curves.png").stat().st_mtime_ns > drawn


def test_numbers_of_a_list_have_their_place():
    assert scalars({"a": 1, "b": None, "c": [0.5, 0.25], "d": "text", "e": [None, 2]}) == {
        "a": 1, "c/0": 0.5, "c/1": 0.25, "e/1": 2}

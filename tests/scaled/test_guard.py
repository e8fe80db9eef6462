"""What a run does about events: a real loop, policy, optimiser and checkpoints around a made-up engine; and one whole
run of two processes with vLLM."""
import json
import shutil
from dataclasses import asdict, replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from conftest import sample_rollout
from processes import finish, start

import nano_moe_rl as nano
from scaled import checkpoint, train
from scaled.checks import check_fit
from scaled.config import Config, read_config
from scaled.export import export_nano
from scaled.folder import resumed_config
from scaled.metrics import Phases
from scaled.rules import NAMES
from scaled.run import Run, make_policy

TINY = nano.Config(layers=1, experts=4, expert_width=8, width=32, heads=1, group_size=4, max_digits=4, max_response=6)
BAD = range(17, 25)  # updates whose rewards are bad, until a run has been there once


@cache
def sampled(n_prompts, seed):
    return sample_rollout(nano.Model(TINY), "fp8", n_prompts, seed)


class TinyRun(Run):
    """Samples come from a fixed model: what is trained decides nothing but log-probabilities and so the metrics."""
    def __init__(self, c, source, faults):
        self.c, self.folder, self.faults = c, source / "runs" / c.name, faults
        self.policy = make_policy(c)
        self.optimizer = nano.adamw(self.policy, c.lr)
        self.engine = SimpleNamespace(eos=[nano.EOS], sleep=lambda: None)
        self.reward = SimpleNamespace(counts={})
        self.version, self.lines, self.engine_bytes, self.syncs = 0, "", 0, []
        self.samples, self.held_out = [], []
        self.advantages, self.loss_fn = nano.group_advantages, nano.minirl_loss
        self.folder.mkdir(parents=True, exist_ok=True)
        if saved := checkpoint.checkpoints(self.folder):
            self.restore(saved[-1])
        self.phases = Phases(silent=True)

    def sync(self):
        self.syncs.append(self.version)

    def rollout(self):
        with self.phases("rollout"), self.phases("reward"):
            batch = sampled(self.c.prompts * self.c.mini_batches, self.version)
        drawn = torch.rand(len(batch.tokens), generator=torch.Generator().manual_seed(self.version))
        if self.faults and self.version + 1 in BAD:
            drawn *= 0.3
        self.faults = self.faults and not self.version + self.c.mini_batches >= BAD[-1]
        return replace(batch, rewards=drawn)

    def samples_due(self):
        return False

    def evaluate(self):
        return {"score": None, "score_errors": None}


@pytest.fixture(scope="module")
def source(group, tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard")
    export_nano(nano.Model(TINY), folder / "hf")
    return folder


def options(source, **changes):
    return Config(**dict(
        name="run", checkpoint=str(source / "hf"), train_data="there", max_prompt=5, max_response=6, prompts=4,
        group_size=4, mini_batches=2, updates=32, lr=1e-3, warmup=1, replay="R2", train_precision="fp32",
        token_budget=4096, gradient_checkpointing=False, checkpoint_every=8, keep=3,
        watch_rules="reward_falls") | changes)


@pytest.fixture
def made(source, monkeypatch):
    """made(options) -> the run that has come to its end, and by what. Each test has a runs folder of its own."""
    shutil.rmtree(source / "runs", ignore_errors=True)
    monkeypatch.chdir(source)
    monkeypatch.setattr(train, "take_counts", lambda reward: dict(errors=0, timeouts=0))

    def make(c, faults=True, stop=lambda: False):
        run = TinyRun(c, source, faults)
        return run, train.train(run, stop)
    return make


def lines(folder, name):
    """All but row 0, of the start."""
    found = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [line for line in found if line["update"]]


def untimed(rows):
    return [{name: x for name, x in row.items() if not name.endswith(("seconds", "gib", "device"))} for row in rows]


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_to_log_is_to_write_down_and_nothing_else(source, made, capsys):
    run, stopped = made(options(source))
    assert stopped == "" and run.version == 32 and run.c == options(source)
    written, = (line for line in lines(run.folder, "events.jsonl") if line["rule"] == "reward_falls")
    assert (written["update"], written["since"], written["metric"]) == (24, 9, "reward")
    rows = lines(run.folder, "metrics.jsonl")
    assert written["value"] == pytest.approx(sum(row["reward"] for row in rows[8:24]) / 16)
    assert written["value"] < written["limit"] < 0.5
    quiet, _ = made(options(source, name="quiet"), faults=False)
    assert "reward_falls" not in (quiet.folder / "events.jsonl").read_text()


def test_stop_ends_after_the_rollout_batch_and_saves(source, made):
    run, stopped = made(options(source, watch="stop"))
    assert stopped == "reward_falls at update 24" and run.version == 24
    assert checkpoint.version_of(checkpoint.checkpoints(run.folder)[-1]) == 24
    assert lines(run.folder, "events.jsonl")[-1] == {"update": 24, "act": "stop"}
    # it goes on, and what happened before is no event again
    run, stopped = made(run.c, faults=False)
    assert stopped == "" and run.version == 32
    assert [row["update"] for row in lines(run.folder, "metrics.jsonl")] == [*range(1, 33)]
    written = [line for line in lines(run.folder, "events.jsonl") if line.get("rule") in (None, "reward_falls")]
    assert [line["update"] for line in written] == [24, 24]


def test_other_rules_do_not_act(source, made):
    """Only those that are named: reward_falls does hold."""
    run, stopped = made(options(source, watch="stop", watch_rules="entropy_falls,groups_equal"))
    assert stopped == "" and run.version == 32


def test_save_makes_a_checkpoint_as_often_as_allowed(source, made):
    for times, versions in ((1, [20, 24, 32]), (0, [20, 32])):
        run, stopped = made(options(source, name=f"save-{times}", watch="save", watch_times=times, checkpoint_every=20))
        assert stopped == "" and run.c.watch_times == 0
        assert [checkpoint.version_of(path) for path in checkpoint.checkpoints(run.folder)] == versions
        assert json.loads((checkpoint.checkpoints(run.folder)[-1] / "config.json").read_text())["watch_times"] == 0


CHANGES = [("lr/2", dict(lr=5e-4)), ("N/2", dict(mini_batches=1)), ("R3", dict(replay="R3"))]


@pytest.mark.parametrize("change, value", CHANGES, ids=[row[0] for row in CHANGES])
def test_back_is_a_run_from_that_checkpoint_with_the_change(source, made, capsys, change, value):
    """The same numbers, to the last bit, as a run that was resumed there by hand with other options."""
    run, stopped = made(options(source, watch="back", watch_change=change))
    changed = replace(options(source, watch="back", watch_change=change), watch_times=0, **value)
    assert stopped == "" and run.version == 32 and run.c == changed
    assert json.loads((run.folder / "config.json").read_text()) == asdict(changed)
    # the event's mean begins at update 9: the checkpoint of update 8 is the last from before it
    back, = (line for line in lines(run.folder, "events.jsonl") if "act" in line)
    assert back == {"update": 24, "act": "back", "to": 8, "change": {"watch_times": 0} | value}
    assert f"update 24: back to 8, {next(iter(value))} {next(iter(value.values()))}" in capsys.readouterr().out
    left = lines(run.folder, "abandoned-000008-000024.jsonl")
    assert [row["update"] for row in left] == [*range(9, 25)]
    rows = lines(run.folder, "metrics.jsonl")
    assert [row["update"] for row in rows] == [*range(1, 33)]
    assert min(row["reward"] for row in left[8:]) < 0.2 < min(row["reward"] for row in rows)
    assert {"abandoned-update-000016", "update-000032"} < names(run.folder) and run.syncs.count(8) == 2

    by_hand = run.folder.with_name("by-hand")
    by_hand.mkdir()
    made(options(source, name="by-hand", updates=8), faults=False)  # the same until there
    (by_hand / "metrics.jsonl").unlink()
    other, _ = made(replace(changed, name="by-hand"), faults=False)
    assert untimed(lines(by_hand, "metrics.jsonl")) == untimed(rows)
    assert all(torch.equal(p.full_tensor(), q.full_tensor())
               for p, q in zip(other.policy.parameters(), run.policy.parameters(), strict=True))


def test_a_change_outlives_what_cuts_the_run_short(source, made):
    """Right after the way back the newest checkpoint has the old options; resuming knows better."""
    seen = []

    def stop():  # asked before each rollout batch
        seen.append(0)
        if len(seen) == 13:  # 24 updates are made, and it is back at 8
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        made(options(source, watch="back", watch_change="lr/2", watch_times=2), stop=stop)
    folder = source / "runs/run"
    assert [checkpoint.version_of(path) for path in checkpoint.checkpoints(folder)] == [0, 8]
    assert json.loads((folder / "update-000008/config.json").read_text())["lr"] == 1e-3
    (folder / "config.json").unlink()  # nobody relies on it
    c = resumed_config("run", {})
    assert (c.lr, c.watch_times) == (5e-4, 1)
    # a later checkpoint has it, and then also what was given after that
    run, _ = made(c, faults=False)
    assert resumed_config("run", {"watch_times": 2}).watch_times == 2
    again, _ = made(replace(c, updates=40, watch_times=2), faults=False)
    assert resumed_config("run", {}) == again.c and again.c.lr == 5e-4
    for line in ("{", "[]", '{"act": "back"}', '{"act": "back", "to": 40, "change": 3}',
                 '{"act": "back", "to": 40, "change": {"lr": "fast"}}',
                 '{"act": "back", "to": 40, "change": {"reward": "os:system"}}'):
        (folder / "events.jsonl").write_text(line)
        with pytest.raises(ValueError, match="--resume run: runs/run/events.jsonl: line 1 is no event; remove"):
            resumed_config("run", {})


def test_back_twice_halves_twice(source, made, monkeypatch):
    monkeypatch.setattr(TinyRun, "faults", property(lambda run: True, lambda run, value: None), raising=False)
    run, stopped = made(options(source, watch="back", watch_change="lr/2", watch_times=2, tensorboard=True))
    assert sum(name.startswith("events.out.") for name in names(run.folder)) == 3  # each forgets what is made again
    acts = [line for line in lines(run.folder, "events.jsonl") if "act" in line]
    assert [act["change"] for act in acts] == [{"watch_times": 1, "lr": 5e-4}, {"watch_times": 0, "lr": 2.5e-4}]
    assert stopped == "" and run.version == 32 and run.c.lr == 2.5e-4  # the third time it only says so


def test_without_a_checkpoint_from_before_the_run_stops(source, made, capsys):
    c = options(source, watch="back", watch_change="lr/2")
    made(replace(c, updates=16), faults=False)
    for path in checkpoint.checkpoints(source / "runs/run")[:-1]:
        shutil.rmtree(path)
    run, stopped = made(c)
    assert stopped == "reward_falls at update 24" and run.version == 24 and run.c.lr == 1e-3
    assert "no checkpoint of update 8 or before to go back to\n" in capsys.readouterr().out
    assert lines(run.folder, "events.jsonl")[-1] == {"update": 24, "act": "stop"}


def test_a_damaged_checkpoint_is_passed_over_on_the_way_back(source, made, capsys):
    c = options(source, watch="back", watch_change="lr/2")
    made(replace(c, updates=16), faults=False)
    (source / "runs/run/update-000008/__0_0.distcp").write_bytes(b"")
    run, _ = made(c)
    back, = (line for line in lines(run.folder, "events.jsonl") if "act" in line)
    assert back["to"] == 0 and run.version == 32
    assert "update-000008 is damaged (__0_0.distcp is not as it was written): going on" in capsys.readouterr().out


REFUSED = [
    (dict(watch="never"), "--watch never: give log or save or stop or back"),
    (dict(watch="back"), "--watch-change none: give R3 or N/2 or lr/2"),
    (dict(watch="back", watch_change="R3", replay="R3"), "--watch-change R3: give N/2 or lr/2: the run replays R3"),
    (dict(watch="back", watch_change="R3", watch_times=2), "--watch-times 2: give 1: R3 can be changed to once"),
    (dict(watch="back", watch_change="N/2", mini_batches=1), "--watch-change N/2: give R3 or lr/2: --mini-batches 1"),
    (dict(watch="back", watch_change="N/2", watch_times=2), "--mini-batches 2 cannot be halved 2 x"),
    (dict(watch="back", watch_change="lr/2", lr=1e-12), "--lr 1e-12 cannot be halved 1 x"),
    (dict(watch="back", watch_change="lr/2", watch_times=10**9), "cannot be halved 1000000000 x"),
    (dict(watch="back", watch_change="lr/2", keep=1), "--keep 1: give more, or a --checkpoint-every above 8"),
    (dict(watch="back", watch_change="lr/2", keep=2), "less than the 16 updates that a rule looks back on"),
    (dict(watch="back", watch_change="lr/2", eval_data="there", eval_every=17), "less than the 17 updates"),
    (dict(watch_change="R4"), "--watch-change R4: give none or R3 or N/2 or lr/2"),
    (dict(watch_rules="reward_falls,entropy"), "--watch-rules reward_falls,entropy: give some of reward_falls, "),
    (dict(watch_times=-1), "--watch-times -1: give 0 to"),
]


@pytest.mark.parametrize("changes, line", REFUSED, ids=[str(row[0]) for row in REFUSED])
def test_an_impossible_change_is_refused_in_one_line(source, changes, line):
    with pytest.raises(ValueError) as refusal:
        options(source, **changes)
    assert line in str(refusal.value) and "\n" not in str(refusal.value) and len(str(refusal.value)) < 400


def test_what_is_possible_is_not_refused(source):
    for changes in (dict(watch_change="R3", replay="none"), dict(watch_change="N/2", mini_batches=4, watch_times=2),
                    dict(watch_change="lr/2", watch_times=9), dict(watch_change="R3", replay="R3", watch_times=0),
                    dict(watch_change="lr/2", watch_rules=",".join(NAMES))):
        assert options(source, watch="back", **changes).watch == "back"


def test_a_family_that_cannot_replay_cannot_change_to_it(source):
    unknown = SimpleNamespace(model_type="own_moe", get_text_config=lambda: unknown)
    with pytest.raises(ValueError, match="own_moe"):
        check_fit(options(source, replay="none", watch="back", watch_change="R3"), unknown)


FAULT = '''
calls = 0
def reward(prompts, texts, tokens):
    """The share of odd tokens; from the third rollout batch on, nothing."""
    global calls
    calls += any(texts)
    return [0.0 if calls > 2 else sum(t % 2 for t in row) / 8 for row in tokens]
'''


def test_two_processes_go_back_together(tmp_path):
    """A reward that breaks at update 9, seen at update 16: all ranks are at update 8 then, with half the rate."""
    export_nano(nano.Model(nano.Config(layers=1, experts=4)), tmp_path / "hf")
    (tmp_path / "train.jsonl").write_text("".join(
        f'{{"prompt": "{a}{b}{c}="}}\n' for a in range(3) for b in range(3, 6) for c in range(6, 9)))
    (tmp_path / "broken.py").write_text(FAULT)
    (tmp_path / "run.toml").write_text("""checkpoint = "hf"
train_data = "train.jsonl"
answer_column = ""
chat = false
reward = "broken:reward"
max_prompt = 7
max_response = 8
updates = 16
prompts = 4
group_size = 8
mini_batches = 4
token_budget = 4096
train_precision = "fp32"
lr = 3e-4
gradient_checkpointing = false
checkpoint_every = 8
keep = 3
check_sync = 2
warmup = 1
watch = "back"
watch_change = "lr/2"
watch_rules = "groups_equal"
""")
    code, out, err = finish(start(tmp_path, "scaled.train", "--config", "run.toml"))
    assert code == 0, err
    folder = tmp_path / "runs/run"
    back, = (line for line in lines(folder, "events.jsonl") if "act" in line)
    assert back == {"update": 16, "act": "back", "to": 8, "change": {"watch_times": 0, "lr": 1.5e-4}}
    rows = lines(folder, "metrics.jsonl")
    assert [row["update"] for row in rows] == [*range(1, 17)] and max(map(len, out.splitlines()[:-1])) <= 80
    assert [row["lr"] for row in rows[8:]] == [1.5e-4] * 8
    left = lines(folder, "abandoned-000008-000016.jsonl")
    assert [row["lr"] for row in left] == [3e-4] * 8
    # the same prompts and, of the same weights, the same responses
    for name in ("response_length", "entropy", "mismatch_kl"):
        assert rows[8][name] == left[0][name] != rows[0][name]
    assert [row["equal_groups"] for row in rows[8:]] == [1.0] * 8 and rows[7]["equal_groups"] < 0.5
    assert checkpoint.options(folder)[0] == asdict(read_config(
        str(tmp_path / "run.toml"), {"lr": 1.5e-4, "watch_times": 0}))


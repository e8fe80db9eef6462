"""Single responses in samples.jsonl: graded texts, and whose experts their tokens have under each mode."""
import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import sample_rollout
from processes import join_group, run_ranks
from transformers import PreTrainedTokenizerBase

import nano_moe_rl as nano
from scaled import train
from scaled.batches import rows_of_rank, take
from scaled.config import Config
from scaled.data import Prompt
from scaled.export import export_nano, nano_tokenizer
from scaled.huggingface import named_weights
from scaled.metrics import Phases
from scaled.policy import load_policy
from scaled.samples import BEFORE, TEXT, TOKENS, replays, routes_of, samples, shorten
from scaled.trainer import prepare_batch

SHAPE = dict(width=64, layers=3, heads=2, kv_heads=1, experts=8, top_k=2, expert_width=24, mini_batch=12, group_size=4)
def text(tokens):
    return " ".join(nano.VOCABULARY[token] for token in tokens)


def test_samples_are_the_first_responses_of_the_first_prompts(rollout):
    """Against the tokens of a rollout of 6 prompts with 4 responses each, one at a time."""
    tokenizer = nano_tokenizer()
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    asked = [Prompt(f"p{p}", rollout.tokens[4 * p, :rollout.prompt_lengths[4 * p]].tolist(), str(p)) for p in range(6)]
    longest = int((rollout.lengths - rollout.prompt_lengths).max())
    rows = samples(rollout, asked, tokenizer, "training", 3, [nano.EOS], longest)
    assert [row["prompt_id"] for row in rows] == ["p0", "p1", "p2"]
    for p, row in enumerate(rows):
        response = rollout.tokens[4 * p, rollout.prompt_lengths[4 * p]:rollout.lengths[4 * p]].tolist()
        assert row["prompt"] == text(asked[p].tokens) and row["reference"] == str(p)
        assert row["response"] == text([token for token in response if token != nano.EOS])
        assert row["reward"] == rollout.rewards[4 * p].item()
        assert row["truncated"] == (len(response) == longest and response[-1] != nano.EOS)
        json.dumps(row)


def test_routes_are_those_of_the_tokens_beside_them():
    """Of a response among whose experts each has its place."""
    T, P, length = 100, 20, 97
    tokens = torch.arange(T + 1) % 13
    engine = torch.stack([torch.arange(T), torch.arange(T) + 1], -1)[None, :, None].to(torch.uint8)  # (1, T, 1, 2)
    live = {mode: engine + 2 + i for i, mode in enumerate(("none", "R2", "R3"))}
    def show(prompt, length):
        rollout = nano.Rollout(tokens[None], torch.tensor([prompt]), torch.tensor([length]), routing=engine)
        return json.loads(json.dumps(routes_of(rollout, engine + 1, live, nano_tokenizer())))

    shown = show(P, length)
    assert shown["response_from"] == BEFORE and len(shown["tokens"]) == TOKENS
    assert [*shown["live_experts"]] == ["none", "R2", "R3"]
    of = [shown["engine_experts"], shown["old_experts"], *shown["live_experts"].values()]
    for i, (token, *experts) in enumerate(zip(shown["tokens"], *of, strict=True)):
        place = P - BEFORE + i
        assert token == nano.VOCABULARY[place % 13]
        assert experts == [[[place + j, place + j + 1]] for j in range(5)]
    short = show(3, 10)
    assert short["response_from"] == 3 and len(short["tokens"]) == 9  # the last token is never fed


def test_a_long_text_lacks_its_middle():
    assert shorten("a" * TEXT) == "a" * TEXT
    short = shorten("a" * TEXT + "b" * 7)
    assert short.startswith("a" * (TEXT // 2)) and short.endswith("b" * 7) and "7 characters" in short


# ------------------------------------------------------------------------------------- Routes in training
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    export_nano(nano.Model(nano.Config(**SHAPE)), folder / "hf")
    return folder


def trained(folder, rollout, mode, N, rank=0, world=1, due=True):
    """A rollout batch through scaled's updates -> their rows, the samples of rank 0, and the weights after."""
    c = Config(checkpoint="there", train_data="there", train_precision="fp32", prompts=3, group_size=4, mini_batches=N,
               updates=N, max_prompt=10, max_response=30, token_budget=60, replay=mode, lr=0.5, warmup=1)
    policy = load_policy(folder / "hf", precision="fp32", logits_bytes=10**6, device="cpu",
                         gradient_checkpointing=True, cpu_offload=False)
    run = SimpleNamespace(c=c, version=0, policy=policy, optimizer=torch.optim.SGD(policy.parameters(), 0.5),
                          loss_fn=nano.minirl_loss, phases=Phases(silent=True), samples_due=lambda: due,
                          samples=[{"reward": 1.0}], tokenizer=nano_tokenizer())
    batch = prepare_batch(policy, take(rollout, rows_of_rank(len(rollout.tokens), N, world, rank)), c)
    return train.updates(run, batch), run.samples, {name: x.clone() for name, x in named_weights(policy)}


def sets(experts):
    """Of ids by token and layer, in which the order says nothing."""
    return torch.as_tensor(experts).long().sort().values.tolist()


@pytest.mark.parametrize("mode, N", [("none", 3), ("R2", 3), ("R3", 3), ("R3", 1)])
def test_experts_under_each_mode_are_those_of_the_single_file(group, folder, mode, N):
    """At the last of N updates, with engines that choose other experts."""
    model = nano.Model(nano.Config(**SHAPE, replay=mode, mini_batches=N, updates=N))
    rollout = sample_rollout(model, "fp8", 3 * N, router_noise=0.8)
    rows, (sample,), weights = trained(folder, rollout, mode, N)
    old, sgd = copy.deepcopy(model), torch.optim.SGD(model.parameters(), 0.5)
    *earlier, last = nano.prepare_batch(model, rollout).split(12)
    for part in earlier:
        nano.train_step(model, sgd, part)
    row, part = last.split(1)[0], slice(int(last.lengths[0]) - 1)
    replay = {"none": None, "R2": nano.policy(old, replace(row, replay=None))[2], "R3": row.routing}
    assert sets(sample["engine_experts"]) == sets(row.routing[0, part])
    assert sets(sample["old_experts"]) == sets(replay["R2"][0, part])
    for name, given in replay.items():
        expected = sets(nano.policy(model, replace(row, replay=given))[2][0, part])
        assert sets(sample["live_experts"][name]) == expected, name
    assert sample["reward"] == 1.0 and len(sample["tokens"]) == int(last.lengths[0]) - 1
    live = sample["live_experts"]
    assert (live["none"] == live["R2"] == sample["old_experts"]) == (N == 1)  # in order too
    assert live["R3"] != live["none"]
    # looking has changed nothing, in no bit
    again, untouched, others = trained(folder, rollout, mode, N, due=False)
    assert again == rows and untouched == [{"reward": 1.0}]
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def recorded(rank, world, folder):
    join_group(rank, world, folder)
    train.RANK = rank
    _, samples, _ = trained(folder, torch.load(folder / "rollout", weights_only=False), "R2", 3, rank, world)
    torch.save(samples, folder / f"samples-{world}-{rank}")
    dist.destroy_process_group()


def test_two_ranks_record_what_one_does(folder):
    """Of responses of unequal lengths: the second rank's, which is longer, only keeps in step."""
    model = nano.Model(nano.Config(**SHAPE))
    rollout = sample_rollout(model, "fp8", 9, router_noise=0.8)
    order = torch.cat([12 * i + rollout.lengths[12 * i:12 * i + 12].argsort() for i in range(3)])
    torch.save(take(rollout, order.tolist()), folder / "rollout")
    for world in (1, 2):
        run_ranks(recorded, world, folder)
    (alone,), (first,), other = (torch.load(folder / f"samples-{name}") for name in ("1-0", "2-0", "2-1"))
    assert alone.keys() == first.keys() and other == [{"reward": 1.0}]
    assert alone["tokens"] == first["tokens"]
    for name in ("engine_experts", "old_experts"):
        assert sets(alone[name]) == sets(first[name])
    for mode in replays(None, None):
        assert sets(alone["live_experts"][mode]) == sets(first["live_experts"][mode])

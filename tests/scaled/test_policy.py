"""The training engine: loading, saving and sharded training against plain transformers."""
import json
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
import transformers as tf
from families import CONFIGS, build
from processes import join_group, run_ranks
from safetensors.torch import load_file

import nano_moe_rl as nano
from scaled import huggingface
from scaled.batches import equal_passes, take
from scaled.huggingface import named_weights, save_pretrained
from scaled.policy import load_policy
from scaled.replay import RoutingReplay

FAMILIES = dict(CONFIGS)
FAMILIES["granitemoe"] = deepcopy(CONFIGS["granitemoe"])
FAMILIES["granitemoe"].logits_scaling = 3.0
FAMILIES["tied"] = deepcopy(CONFIGS["qwen3_moe"])
FAMILIES["tied"].tie_word_embeddings = True
TEMPERATURE = 0.7
PLAIN = dict(precision="fp32", logits_bytes=61 * 4 * 5, gradient_checkpointing=False,
             cpu_offload=False, device="cpu")


def whole_weights(policy):
    return {name: x.clone() for name, x in named_weights(policy)}


# ------------------------------------------------------------------------------ loading and saving
def sample_tokens():
    generator = torch.Generator().manual_seed(1)
    tokens, lengths = torch.randint(61, (3, 14), generator=generator), torch.tensor([14, 5, 9])
    fed = torch.arange(1, 14) < lengths[:, None]
    return tokens, fed


def load_and_save(rank, world, folder):
    huggingface.SHARD_BYTES = 3e5  # several files an export
    tokens, fed = sample_tokens()
    tokens[:, 1:][~fed] = -1  # padding may be anything
    for name in FAMILIES:
        policy = load_policy(folder / name, **PLAIN)
        assert {p.dtype for p in policy.parameters()} == {torch.float32}
        some = fed & (torch.arange(13) >= 6 - rank)  # of the second row nothing, on rank 0
        with torch.no_grad():
            logprobs, entropies = policy(tokens, fed, TEMPERATURE)
            masked = policy(tokens, fed, TEMPERATURE, mask=some)
        for one, whole in zip(masked, (logprobs, entropies)):  # chunks of other tokens: other sums
            torch.testing.assert_close(one, whole.masked_fill(~some, 0), atol=2e-6, rtol=0)
        got = dict(weights=whole_weights(policy), buffers=dict(policy.model.named_buffers()),
                   logprobs=logprobs, entropies=entropies,
                   local=sum(p.to_local().numel() for p in policy.parameters()))
        save_pretrained(policy, folder / f"{name}-{world}", None)
        if rank == 0:
            torch.save(got, folder / f"{name}-{world}.pt")


def work(rank, world, folder):
    join_group(rank, world, folder)
    load_and_save(rank, world, folder)
    train(rank, world, folder)
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[1, 2])
def loaded(request, tmp_path_factory):
    """A folder with checkpoints of all families, what `world` ranks made of them, and `world`."""
    folder, world = tmp_path_factory.mktemp("families"), request.param
    for name, config in FAMILIES.items():
        build(config).save_pretrained(folder / name, max_shard_size="200KB")
    run_ranks(work, world, folder)
    return folder, world


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sharded_policy_is_the_model_of_transformers(loaded, family):
    folder, world = loaded
    files = list((folder / family).glob("*.safetensors"))
    names = [name for file in files for name in load_file(file)]
    assert len(files) > 3
    if family not in ("gpt_oss", "granitemoe"):  # whose experts are published packed
        assert any(".experts.9." in n or ".experts.6." in n for n in names)
    model = tf.AutoModelForCausalLM.from_pretrained(folder / family, dtype=torch.float32)
    got, expected = torch.load(folder / f"{family}-{world}.pt"), model.state_dict()

    if family == "tied":
        assert torch.equal(expected.pop("lm_head.weight"), expected["model.embed_tokens.weight"])
    assert got["weights"].keys() == expected.keys()  # complete, each once
    for name, x in expected.items():
        assert x.dtype == got["weights"][name].dtype and torch.equal(x, got["weights"][name]), name
    buffers = dict(model.named_buffers())
    assert got["buffers"].keys() == buffers.keys()
    assert all(torch.equal(x, got["buffers"][name]) for name, x in buffers.items())
    assert got["local"] <= sum(p.numel() for p in model.parameters()) * [1, 0.6][world - 1]

    tokens, fed = sample_tokens()
    with torch.no_grad():
        logits = model(tokens[:, :-1], attention_mask=fed.long()).logits
    expected = torch.distributions.Categorical(logits=logits / TEMPERATURE)
    for name, x in dict(logprobs=expected.log_prob(tokens[:, 1:]),
                        entropies=expected.entropy()).items():
        torch.testing.assert_close(got[name], x.masked_fill(~fed, 0), atol=5e-6, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_is_the_published_folder_again(loaded, family):
    folder, world = loaded

    def tensors(path):
        return {name: x for file in path.glob("*.safetensors")
                for name, x in load_file(file).items()}
    before, after = tensors(folder / family), tensors(folder / f"{family}-{world}")
    assert before.keys() == after.keys()  # one tensor per expert where the family publishes so
    for name, x in before.items():
        assert x.dtype == after[name].dtype and torch.equal(x, after[name]), name
    model = tf.AutoModelForCausalLM.from_pretrained(folder / family)
    again = tf.AutoModelForCausalLM.from_pretrained(folder / f"{family}-{world}")
    assert type(again) is type(model) and again.dtype == torch.float32
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())
    index = json.loads((folder / f"{family}-{world}" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in after.values())


# ---------------------------------------------------------------------------------------- training
VARIANTS = {  # changes of load_policy's options; family
    "fp32": ({}, "qwen3_moe"),
    "checkpointing": (dict(gradient_checkpointing=True), "qwen3_moe"),
    "offload": (dict(cpu_offload=True), "qwen3_moe"),
    "tied": ({}, "tied"),
    "bf16": (dict(precision="bf16", gradient_checkpointing=True), "qwen3_moe"),
    "bf16 ernie": (dict(precision="bf16", gradient_checkpointing=True), "ernie4_5_moe")}


def make_rollout():
    """Six graded rows. Ranks get three each, so the first has the long ones."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.tensor([41, 40, 38, 6, 5, 4])
    return nano.Rollout(
        tokens=torch.randint(61, (6, 41), generator=generator), lengths=lengths,
        prompt_lengths=torch.tensor([3, 5, 2, 2, 3, 2]),
        rollout_logprobs=torch.randn(6, 40, generator=generator) * 0.5 - 4.5,
        advantages=torch.tensor([1.0, -0.5, 0.7, -1.2, 0.9, -0.9]))


def three_updates(forward, parameters, rollout, passes, reduce):
    """MiniRL with AdamW and clipping. forward(part) -> logprobs; reduce sums a loss over ranks."""
    parameters = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 3e-4, (0.9, 0.95), weight_decay=0.1)
    history = []
    for _ in range(3):
        optimizer.zero_grad()
        total = torch.zeros(())
        for rows in passes:
            part = take(rollout, rows)
            logprobs = forward(part)
            loss, _ = nano.minirl_loss(logprobs, logprobs.detach(), part.rollout_logprobs,
                                       part.advantages, part.mask, n_sequences=6, n_tokens=0)
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        history.append((reduce(total).item(), norm.item()))
        optimizer.step()
    return history


def train(rank, world, folder):
    whole, results = make_rollout(), {}
    size = 6 // world
    rollout = whole.split(size)[rank]
    passes = equal_passes(rollout.lengths.tolist(), 45, "cpu")
    assert len(passes) == {1: 4, 2: 3}[world]  # those of the rank with long rows
    for name, (changes, family) in VARIANTS.items():
        policy = load_policy(folder / family, **PLAIN | changes)
        before = whole_weights(policy)

        def forward(part):
            return policy(part.tokens, part.fed, TEMPERATURE)[0]

        def reduce(x):
            dist.all_reduce(x)
            return x
        history = three_updates(forward, policy.parameters(), rollout, passes, reduce)
        with torch.no_grad():  # afterwards the weights are shards still
            forward(take(rollout, [0]))
        assert {(p.dtype, p.grad.dtype) for p in policy.parameters() if p.requires_grad} == {
            (torch.float32, torch.float32)}
        results[name] = dict(history=history, before=before, after=whole_weights(policy))
    results["routes"] = replayed(folder, whole, rank, world)
    if rank == 0:
        torch.save(results, folder / f"trained-{world}.pt")


def replayed(folder, rollout, rank, world):
    """Gradient of the first router under foreign routes, with checkpointing, summed over ranks."""
    policy = load_policy(folder / "qwen3_moe", **PLAIN | dict(gradient_checkpointing=True))
    part = take(rollout, list(range(rank, 6, world)))
    routes = foreign_routes(rollout)[rank::world, : part.tokens.shape[1] - 1]
    with RoutingReplay(policy.model, routes, part.fed) as replay:
        policy(part.tokens, part.fed, TEMPERATURE)[0][part.mask].sum().backward()
    gradient = policy.model.model.layers[0].mlp.gate.weight.grad.full_tensor()
    return replay.routing.shape, gradient


def foreign_routes(rollout):
    scores = torch.rand(*rollout.fed.shape, 3, 10, generator=torch.Generator().manual_seed(3))
    return scores.topk(3).indices.to(torch.uint8)


@pytest.fixture(scope="module")
def trained(loaded):
    folder, world = loaded
    return folder, torch.load(folder / f"trained-{world}.pt")


def plainly(folder, family):
    """The same updates by transformers alone: no sharding, no chunks, all rows in one pass."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder / family, dtype=torch.float32)

    def forward(part):
        logits = model(part.tokens[:, :-1], attention_mask=part.fed.long()).logits
        return nano.token_logprobs(logits, part.tokens[:, 1:], TEMPERATURE)
    history = three_updates(
        forward, model.parameters(), make_rollout(), [list(range(6))], lambda x: x)
    return history, model.state_dict()


@pytest.mark.parametrize("variant", ["fp32", "checkpointing", "offload", "tied"])
def test_ranks_train_as_a_single_process_does(trained, variant):
    folder, results = trained
    history, weights = plainly(folder, VARIANTS[variant][1])
    assert history[0][1] > 0.5  # clipping acts
    torch.testing.assert_close(torch.tensor(results[variant]["history"]), torch.tensor(history),
                               atol=1e-5, rtol=1e-5)
    for name, x in results[variant]["after"].items():
        torch.testing.assert_close(x, weights[name], atol=3e-5, rtol=0, msg=name)
    assert not torch.equal(weights["model.embed_tokens.weight"],
                           results[variant]["before"]["model.embed_tokens.weight"])


@pytest.mark.parametrize("variant", ["bf16", "bf16 ernie"])
def test_bf16_is_close_and_keeps_fp32_weights(trained, variant):
    folder, results = trained
    history, weights = plainly(folder, VARIANTS[variant][1])
    torch.testing.assert_close(torch.tensor(results[variant]["history"]), torch.tensor(history),
                               atol=0, rtol=0.05)
    after, before = results[variant]["after"], results[variant]["before"]
    head = after["lm_head.weight"]
    assert not torch.equal(head, head.bfloat16().float())  # updates smaller than bf16 resolves
    mine, theirs = (x["lm_head.weight"] - before["lm_head.weight"] for x in (after, weights))
    assert torch.cosine_similarity(mine.flatten(), theirs.flatten(), dim=0) > 0.98


def test_replay_works_inside_a_sharded_policy(trained):
    folder, results = trained
    shape, gradient = results["routes"]
    assert shape[2:] == (3, 3)
    model = tf.AutoModelForCausalLM.from_pretrained(folder / "qwen3_moe", dtype=torch.float32)
    rollout = make_rollout()
    with RoutingReplay(model, foreign_routes(rollout), rollout.fed):
        logits = model(rollout.tokens[:, :-1], attention_mask=rollout.fed.long()).logits
        logprobs = nano.token_logprobs(logits, rollout.tokens[:, 1:], TEMPERATURE)
        logprobs[rollout.mask].sum().backward()
    expected = model.model.layers[0].mlp.gate.weight.grad
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)

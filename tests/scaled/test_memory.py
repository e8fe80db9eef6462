"""The memory of a plan against what torch's own tracker sees of the trainer, and other counts of bytes."""
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers as tf
from families import CONFIGS, build
from test_sizes import PLANNED
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

import nano_moe_rl as nano
from scaled import policy as policy_module
from scaled import trainer
from scaled.config import Config, read_config
from scaled.export import export_nano, transformers_twin
from scaled.facts import MODELS
from scaled.logprobs import head_logprobs
from scaled.machine import Machine
from scaled.memory import GIB, LINES, MOMENTS, TRAINER, Memory
from scaled.policy import Policy, load_policy
from scaled.sizes import measure, read_configuration

CONFIGURATIONS = Path(nano.__file__).parent / "scaled/configs"
CPU = torch.device("cpu")


@pytest.fixture
def world(request):
    """A process group of so many ranks of which this one is real: collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


def trainer_bytes(memory):
    """The plan's peak of what the trainer allocates: the larger of head and layer, without assumptions."""
    return max(sum(line(memory, moment) for line in TRAINER if moment in line.moments) for moment in ("head", "layer"))


def options(B, T, **changes):
    """For passes of B rows of T + 1 tokens."""
    return Config(**dict(
        checkpoint="there", train_data="there", max_prompt=3, max_response=T - 2, token_budget=B * (T + 1),
        mini_batches=1, updates=1, replay="R3", train_precision="fp32", gradient_checkpointing=False) | changes)


def rollout(s, B, T):
    generator = torch.Generator().manual_seed(0)
    routing = torch.rand(B, T, s.moe_layers, s.n_experts, generator=generator).topk(s.top_k).indices.to(torch.uint8)
    rewards = torch.rand(B, generator=generator)
    return nano.Rollout(
        torch.randint(s.vocabulary, (B, T + 1), generator=generator), torch.full((B,), 3), torch.full((B,), T + 1),
        torch.zeros(B, T), routing, 0, rewards=rewards, advantages=rewards - 0.5, replay=routing)


def measured_step(monkeypatch, folder, s, c, B, T):
    """One train step of the trainer with two passes -> the tracker's snapshot at its peak."""
    policy = load_policy(folder, precision=c.train_precision, logits_bytes=c.logits_mib * 2**20, cpu_offload=False,
                         gradient_checkpointing=c.gradient_checkpointing, device="cpu")
    optimizer = nano.adamw(policy, 1e-6)
    for p in policy.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # makes its moments
    optimizer.zero_grad()
    tracker, passes = FSDPMemTracker(policy, optimizer), trainer.passes

    def noticed(*args):
        for rows in passes(*args):
            tracker.reset_mod_stats()  # it takes a second pass for an error otherwise
            yield rows
    monkeypatch.setattr(trainer, "passes", noticed)
    monkeypatch.setattr(trainer.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(1.0))  # sums of no ranks: NaN
    with tracker:
        trainer.train_step(policy, optimizer, rollout(s, 2 * B, T), c, nano.minirl_loss)
    return tracker.get_tracker_snapshot("peak")[CPU]


# -------------------------------------------------------------------- the trainer, really run
@pytest.mark.parametrize("world, changes", [(1, {}), (8, dict(gradient_checkpointing=True)), (
    8, dict(train_precision="bf16", gradient_checkpointing=True)), (8, dict(train_precision="bf16"))],
    ids=str, indirect=["world"])
def test_a_train_step_of_the_laptop_model(monkeypatch, tmp_path, world, changes):
    """Its shapes and lengths, 128 rows a pass: one process as the recipe has it, and eight with other options."""
    model = nano.Model(nano.Config())
    export_nano(model, tmp_path / "laptop")
    s = measure("laptop", "", transformers_twin(model).config)
    c = options(128, 27, prompts=64 * world, group_size=4, **changes)
    memory = Memory(c, Machine(gpus=world), s)
    assert memory.tokens == 128 * 28
    got = measured_step(monkeypatch, tmp_path / "laptop", s, c, 128, 27)
    assert got["Sharded Param"] == memory.weights("layer")
    assert got["OptState"] == pytest.approx(memory.moments("layer"), rel=1e-3)  # and counts of steps
    assert trainer_bytes(memory) == pytest.approx(got["Total"], rel=0.06)


@pytest.mark.parametrize("world", [8], indirect=True)
@pytest.mark.parametrize("family", PLANNED)
def test_a_train_step_of_every_family(monkeypatch, tmp_path, world, family):
    build(CONFIGS[family]).save_pretrained(tmp_path / family)
    s = measure(family, "", CONFIGS[family])
    c = options(8, 120, prompts=32, group_size=4, train_precision="bf16", gradient_checkpointing=True)
    got = measured_step(monkeypatch, tmp_path / family, s, c, 8, 120)
    assert trainer_bytes(Memory(c, Machine(), s)) == pytest.approx(got["Total"], rel=0.08)


# ----------------------------------------------------- the same at the sizes of published models
class Dense(Policy):
    """Rows without padding: what depends on values of tensors cannot be asked of tensors that have none."""

    def forward(self, tokens):
        hidden = self.model.base_model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        return head_logprobs(hidden, self.model.get_output_embeddings().weight, tokens[:, 1:], 1.0,
                             self.logits_bytes)[0].clone()  # FSDP2 warns of views


def tracked_pass(monkeypatch, config, c, world, T):
    """The second forward and backward pass of a policy whose tensors have shapes, and no memory."""
    mesh = policy_module.init_device_mesh("cpu", (world,))
    monkeypatch.setattr(policy_module, "init_device_mesh", lambda *_: mesh)
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda *_: None)  # asks values
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.set_experts_implementation("grouped_mm")
        policy = Dense(model.eval(), c.logits_mib * 2**20)
        policy_module._shard(policy, "bf16", c.gradient_checkpointing, False, CPU)
        optimizer, tokens = nano.adamw(policy, 1e-6), torch.zeros(1, T + 1, dtype=torch.long)
        policy(tokens).sum().backward()
        optimizer.step()
        tracker = FSDPMemTracker(policy, optimizer)
        with tracker:
            policy(tokens).sum().backward()
    return tracker.get_tracker_snapshot("peak")[CPU]["Total"]


@pytest.mark.parametrize("world, name, layers, tokens, changes", [
    (8, "Qwen3-30B-A3B", 3, 33792, {}),  # a row of the node's recipe
    (512, "Qwen3-235B-A22B", 3, 8192, {}),  # more ranks than experts: what is gathered is mostly padding
    (8, "Qwen3-30B-A3B", 2, 8192, dict(logits_mib=8192)),  # the head decides
    (8, "OLMoE-1B-7B", 4, 4096, dict(gradient_checkpointing=False))], ids=str)
def test_a_pass_at_the_sizes_of_a_published_model(monkeypatch, world, name, layers, tokens, changes):
    published = MODELS[name]
    config = tf.AutoConfig.for_model(published.model_type, **published.config | dict(num_hidden_layers=layers))
    s = measure(name, "", config)
    c = Config(**dict(checkpoint="there", train_data="there", max_prompt=1, max_response=tokens - 1,
                      token_budget=tokens, prompts=world, group_size=2, replay="none") | changes)
    memory = Memory(c, Machine(gpus=world), s)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        got = tracked_pass(monkeypatch, config, c, world, tokens)
    finally:
        dist.destroy_process_group()
    assert trainer_bytes(memory) - memory.routes("layer") == pytest.approx(got, rel=0.06)


# ------------------------------------------------------------------------------- the other lines
def node(**changes):
    """The recipe for a node, on H200s."""
    c = read_config(str(CONFIGURATIONS / "qwen3_30b_a3b.toml"), changes)
    return Memory(c, Machine(gpu="h200"), measure(*read_configuration(c, "")))


def test_host_memory_is_what_the_page_says_by_torchs_sources():
    """Re-derived there: 490 GB of weights, gradients and moments; 570 with blocks rounded up to powers of two."""
    page = (CONFIGURATIONS.parent / "README.md").read_text()
    plain, rounded = map(int, re.search(r"some (\d+) GB a node.*?(\d+) GB\s+unless", page, re.DOTALL).groups())
    host = node().host()
    assert host["trainer"] == pytest.approx(plain * 1e9, rel=0.01)
    assert host["trainer"] + host["pinned blocks, rounded"] == pytest.approx(rounded * 1e9, rel=0.01)
    assert node(cpu_offload=False).host()["trainer"] == pytest.approx(12 * 30.532e9, rel=1e-3)


def test_routes_in_host_memory_are_those_of_all_ranks():
    """12.6 MB a row at 32k tokens, of which every rank of an engine has all and keeps its own."""
    memory = node(mini_batches=2)
    row = 32768 * memory.s.route_bytes
    assert row == pytest.approx(12.6e6, rel=0.01)
    c = memory.c
    of_engine = c.prompts * c.group_size * c.mini_batches // 4  # four engines of two ranks
    assert memory.sequences == of_engine
    mean, longest = sum(memory.lengths), c.max_length
    assert memory.host()["routes"] == pytest.approx(8 * of_engine * memory.s.route_bytes * (2 * mean + longest))
    short = Memory(c, replace(memory.m, mean_prompt=1.0, mean_response=1.0), memory.s)
    assert short.host()["routes"] == 8 * memory.s.route_bytes * longest * (of_engine + of_engine // 2)
    twice = Memory(replace(c, replay="R2"), short.m, memory.s)
    assert twice.host()["routes"] == 8 * memory.s.route_bytes * longest * 2 * of_engine


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8", "fp32"])
def test_weights_of_the_engine_one_tensor_at_a_time(precision):
    memory = node(rollout_precision=precision)
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(read_configuration(memory.c, "")[2])
    size = 0
    for name, weight in model.named_parameters():
        expert, attention = ".experts." in name, re.search(r"\.[qkvo]_proj\.", name)
        one = precision == "int8" and expert or precision == "fp8" and (expert or attention)
        size += weight.numel() * (1 if one else 4 if precision == "fp32" else 2)
    assert memory.engine_weights() * 2 == size  # two tensor-parallel ranks


def test_the_cache_is_what_the_share_of_the_engine_leaves():
    memory = node()
    engine = memory.engine_weights() + memory.engine_activations() + memory.cache()
    assert engine == pytest.approx(0.6 * 139.81 * GIB)
    # 2 of 4 key-value heads on each of two GPUs: 2 · 48 layers · 2 heads · 128 · 2 bytes a token
    assert memory.cached_tokens == pytest.approx(memory.cache() / (2 * 48 * 2 * 128 * 2))
    eight = node(tensor_parallel=8)  # heads are repeated: a GPU has one of four
    assert eight.cached_tokens == pytest.approx(eight.cache() / (2 * 48 * 128 * 2))


def test_totals_are_the_sums_of_lines_and_faults_follow_them():
    memory = node(cpu_offload=False)
    for moment in MOMENTS:
        lines = [line(memory, moment) for line in LINES if moment in line.moments]
        assert memory.totals()[moment] == pytest.approx(sum(lines))
    assert not memory.faults()
    layer = memory.totals()["layer"] / GIB
    for gib, faults in (layer + 1e-3, []), (layer - 1e-3, [f"layer: {layer:.1f} of {layer - 1e-3:.1f} GiB"]):
        tight = Memory(replace(memory.c, gpu_memory=0.4, check_sync=0), replace(memory.m, gib=gib), memory.s)
        assert tight.faults() == faults
    unchecked = Memory(replace(memory.c, check_sync=0), memory.m, memory.s)
    assert unchecked.totals().keys() == set(MOMENTS) - {"check"}
    cramped = Memory(replace(memory.c, gpu_memory=0.13), memory.m, memory.s)
    assert cramped.faults() == [f"KV cache: {max(0, cramped.cached_tokens):.0f} tokens, a response may have 33792"]
    poor = Memory(memory.c, replace(memory.m, host_gib=500.0), memory.s)
    assert poor.faults() == [f"host memory: {sum(poor.host().values()) / GIB:.0f} of 500 GiB a node"]


def test_every_line_states_its_formula():
    assert len(LINES) == len({line.label for line in LINES}) > 12
    for line in LINES:
        assert set(line.moments) <= set(MOMENTS) and len(line.__doc__) > 20

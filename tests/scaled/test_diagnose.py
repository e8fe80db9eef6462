"""What the diagnosis measures, and that it names each of the known faults, planted in a real engine's answers."""
import json
import math
import re
from dataclasses import replace
from itertools import product

import pytest
import torch
from processes import finish, run_ranks, start
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import nano_moe_rl as nano
from scaled import diagnose, gap
from scaled.export import export_nano

L, A, E = 3, 2, 8


def observation(seed=0, B=3, T=7):
    """Hand-made: rows of 7, 5 and 3 fed tokens after prompts of 2, and routes that differ in some places."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([7, 5, 3])
    fed = torch.arange(T) < lengths[:, None]
    mask = fed & (torch.arange(T) >= 1)
    def logprobs():
        return -3 * torch.rand(B, T, generator=generator)
    mu = logprobs()
    routing = torch.rand(B, T, L, E, generator=generator).argsort(-1)[..., :A]
    own = routing.flip(-1).clone()  # the order of columns says nothing
    own[0, 2, 1] = (own[0, 2, 1] + 1) % E
    own[1, 4, 0] = (own[1, 4, 0] + 1) % E
    return gap.Observation(fed, mask, mu, mu + 0.3 * logprobs(), logprobs(), routing, own, mu + 0.1 * logprobs())


def test_distances_against_a_loop_over_tokens():
    seen = observation()
    pairs = [(seen.rollout_logprobs[b, t].item(), seen.own_logprobs[b, t].item())
             for b, t in product(range(3), range(7)) if seen.mask[b, t]]
    got = gap.distances(seen.rollout_logprobs, seen.own_logprobs, seen.mask)
    sizes, ratios = [abs(pi - mu) for mu, pi in pairs], [math.exp(pi - mu) for mu, pi in pairs]
    n = len(pairs)
    assert got["mean"] == pytest.approx(sum(sizes) / n) and got["max"] == pytest.approx(max(sizes))
    assert got["k1"] == pytest.approx(sum(mu - pi for mu, pi in pairs) / n)
    assert got["k3"] == pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / n)
    assert got["extreme_token_fraction"] == pytest.approx(sum(max(r, 1 / r) > 2 for r in ratios) / n)
    assert got["effective_sample_size"] == pytest.approx(sum(ratios)**2 / n / sum(r * r for r in ratios))
    assert got["equal_bits"] == 0 and sum(got["histogram"]) == n
    for i, part in enumerate(got["by_probability"]):
        low, high = ([0] + gap.BUCKETS)[i], (gap.BUCKETS + [1])[i]
        inside = [size for size, (mu, _) in zip(sizes, pairs) if low < math.exp(mu) <= high]
        assert part["tokens"] == len(inside)
        assert part["mean"] == (pytest.approx(sum(inside) / len(inside)) if inside else None)
    same = gap.distances(seen.own_logprobs, seen.own_logprobs, seen.mask)
    assert same["equal_bits"] == 1 and same["k3"] == 0 and same["histogram"][0] == n


def test_weights_above_the_cap_are_counted_and_one_at_it():
    mask, mu = torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4)
    pi = torch.tensor([[4.9, 5.0, 5.1, 1.0]]).log()
    assert gap.distances(mu, pi, mask)["truncated_fraction"] == pytest.approx(0.5)


def test_routes_apart_by_layer_position_and_first_layer():
    seen = observation()
    got = gap.routes_apart(seen)
    assert got["agreement_by_layer"] == pytest.approx([14 / 15, 14 / 15, 1])  # of 15 fed tokens
    assert got["first_layer_that_differs"] == pytest.approx([1 / 15, 1 / 15, 0])
    assert [(part["from"], part["tokens"]) for part in got["agreement_by_position"]] == [(0, 11), (4, 4)]
    assert [part["agreement"] for part in got["agreement_by_position"]] == pytest.approx([1 - 1 / 33, 1 - 1 / 12])
    own, replayed = (gap.distances(seen.rollout_logprobs, x, seen.mask)["k3"]
                     for x in (seen.own_logprobs, seen.replayed_logprobs))
    assert got["routing_share"] == pytest.approx(1 - replayed / own)


def test_ranks_are_put_together_without_their_padding():
    one, other = observation(0), observation(1)
    short = gap.Observation(**{name: x[1:, :5] for name, x in vars(other).items()})
    both = gap.together([one, short])
    assert both.routing.shape == (5, 7, L, A) and both.fed.sum() == 15 + 8
    assert torch.equal(both.own_logprobs[both.mask], torch.cat([one.own_logprobs[one.mask],
                                                                short.own_logprobs[short.mask]]))


def found(own, replayed=None, share=None):
    given = {"own": {"extreme_token_fraction": own}, "routing_share": share}
    return given | ({"replayed": {"extreme_token_fraction": replayed}} if replayed is not None else {})


@pytest.mark.parametrize("gaps, precision, advice", [
    (found(9e-5, 9e-5, 0.1), "bf16", ("R3", 8, "bf16")),
    (found(1e-4, 1e-4, 0.1), "bf16", ("R2", 2, "bf16")),  # at the threshold
    (found(5e-3, 9e-5, 0.5), "fp8", ("R3", 8, "fp8")),
    (found(5e-3, 1e-4, 0.5), "fp8", ("R3", 4, "fp8")),
    (found(5e-3, 4e-3, 0.49), "fp8", ("R2", 2, "fp8")),
    (found(0.1, 0.09, 0.3), "fp8", ("R2", 1, "bf16")),
    (found(0.2, 0.1, 0.6), "bf16", ("R3", 1, "fp32")),
    (found(0.2, 0.2, 0.1), "fp32", ("R2", 2, "fp32")),  # there is nothing finer
    (found(5e-3), "bf16", ("none", 2, "bf16")),  # a family without replay
])
def test_the_recommendation_at_its_thresholds(gaps, precision, advice):
    got = gap.recommend(gaps, precision, [])
    assert (got["replay"], got["mini_batches"], got["precision"]) == advice and got["because"]
    assert gap.recommend(gaps, precision, ["stale routes"])["replay"] is None


# ----------------------------------------------------------------------- planted in a real engine
def plant(rank, world, folder):
    from scaled.config import Config
    from scaled.diagnose import observe, shake, sync_twice
    from scaled.huggingface import named_weights
    from scaled.ranks import Ranks
    from scaled.run import make_engine, make_policy

    ranks = Ranks()
    torch.manual_seed(3)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=53, hidden_size=64, num_hidden_layers=L, num_experts=E, num_experts_per_tok=A,
        moe_intermediate_size=96, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=512, norm_topk_prob=True, eos_token_id=7, bos_token_id=None, initializer_range=0.15))
    model.save_pretrained(folder / "hf")
    c = Config(name="x", checkpoint=str(folder / "hf"), train_data="none", temperature=0.7, replay="none",
               train_precision="fp32", rollout_precision="fp32", max_prompt=8, max_response=16, mini_batches=1,
               gradient_checkpointing=False)
    engine, policy = make_engine(c), make_policy(c)
    rollout = engine.generate([[(5 * p + 3 * t) % 53 for t in range(4)] for p in range(6)], 2, 16, 0, 0)
    start = {name: x.detach().clone() for name, x in named_weights(policy)}

    def faults(rollout):
        seen = observe(policy, rollout, c)
        return [fault for fault in (gap.logprob_fault(seen), gap.route_fault(seen)) if fault]

    def restore():
        with torch.no_grad():
            for name, x in policy.model.state_dict(keep_vars=True).items():
                x.to_local().copy_(start[name])  # one rank: all of it

    routes, said = rollout.routing, {"nothing": faults(rollout)}
    said["constant"] = faults(replace(rollout, routing=routes[:1, :1].expand_as(routes).clone()))
    for by in (1, -1, 2):
        said[f"shift {by}"] = faults(replace(rollout, routing=routes.roll(by, 1)))
    for by in (1, -1):
        said[f"layer {by}"] = faults(replace(rollout, routing=routes.roll(by, 2)))
    said["foreign"] = faults(replace(rollout, routing=routes.roll(3, 0)))
    untempered = observe(policy, rollout, c).untempered_logprobs
    said["temperature"] = faults(replace(rollout, rollout_logprobs=untempered))
    shake(policy, 1)
    stale = observe(policy, rollout, c).own_routing
    for _ in range(6):
        shake(policy, 2)
    said["other weights"] = faults(rollout)
    restore()
    said["stale routes"] = faults(replace(rollout, routing=stale))

    class Broken:
        """The engine, with one sync that goes wrong."""
        def __init__(self, spoil):
            self.spoil = spoil
        def __getattr__(self, name):
            return getattr(engine, name)
        def load_weights(self, weights, version):
            given = {name: x.detach().clone() for name, x in weights}
            engine.load_weights(self.spoil(given, version).items(), version)

    kept = {}
    def rolled_back(given, version):
        return given if version == 1 else start
    def stale_weights(given, version):
        kept[version] = given
        return kept[1]
    def old_head(given, version):
        return given | {"lm_head.weight": start["lm_head.weight"]} if version == 1 else given
    sequences = [row[:n].tolist() for row, n in zip(rollout.tokens, rollout.lengths)]
    for name, spoil in dict(good=lambda given, _: given, back=rolled_back, stale=stale_weights, head=old_head).items():
        said[f"sync {name}"] = sync_twice(Broken(spoil), policy, sequences)
        restore()
    (folder / "said.json").write_text(json.dumps(said))
    engine.close()
    ranks.end()


def test_each_planted_fault_is_named(tmp_path):
    run_ranks(plant, 1, tmp_path)
    said = json.loads((tmp_path / "said.json").read_text())
    expected = {
        "nothing": [], "constant": ["constant routes: all tokens"],
        "shift 1": ["shifted routes: a token has those of 1 position(s) before"],
        "shift -1": ["shifted routes: a token has those of 1 position(s) after"],
        "shift 2": ["shifted routes: a token has those of 2 position(s) before"],
        "layer 1": ["layer offset: a layer has the routes of 1 layer(s) before"],
        "layer -1": ["layer offset: a layer has the routes of 1 layer(s) after"],
        "foreign": ["foreign routes: a response has those of another"],
        "temperature": ["temperature left out"], "other weights": ["other weights"],
        "stale routes": ["stale routes"], "sync good": ["", ""],
        "sync back": ["", "sync 2 left the engine with the weights of the folder"],
        "sync stale": ["", "sync 2 left the engine with the weights of the sync before"],
        "sync head": ["sync 1 left the engine with the new weights, but an old output head", ""]}
    assert said.keys() == expected.keys()
    for name, faults in expected.items():
        assert len(said[name]) == len(faults), (name, said[name])
        for got, begin in zip(said[name], faults):
            assert got.startswith(begin) and bool(got) == bool(begin), (name, said[name])


def test_the_command_on_two_ranks(tmp_path):
    export_nano(nano.Model(nano.Config()), tmp_path / "cold")
    (tmp_path / "cold/train.jsonl").write_text("".join(f'{{"prompt": "{n}="}}\n' for n in (314, 159, 2653, 589)))
    code, out, err = finish(start(
        tmp_path, "scaled.diagnose", "--model", "cold", "--prompts", "cold/train.jsonl", "--max-prompt", 6,
        "--max-response", 8, "--count", 4, "--json", "--picture", "gap.png", "--train-precision", "fp32",
        "--precision", "fp32"))
    assert code == 0, err
    said = json.loads(out)
    assert said["faults"] == [] and said["responses"] == 16 and len(said["agreement_by_layer"]) == nano.Config().layers
    assert said["own"]["k3"] < 1e-9 and (tmp_path / "gap.png").read_bytes().startswith(b"\x89PNG")
    assert sum(said["own"]["histogram"]) == said["tokens"]


@pytest.mark.parametrize("argv, line", [
    ("--model absent", "--model absent: .*"),
    ("--model runs/a",
     "--model runs/a: is a run; python -m scaled.export runs/a DIR makes a Hugging Face folder of it"),
    ("--model runs/a --count 0", "--count 0: give 1 or more"),
    ("--model runs/a --picture no/gap.png", "--picture no/gap.png: no is no folder; make it first"),
    ("--model runs/a --picture gap.pdf", "--picture gap.pdf: give a name that ends in .png"),
    ("--model runs/a --picture runs/a", "--picture runs/a: exists; give a new file"),
    ("--model runs/a --max-response 0", "--max-response 0: give 1 to .*"),
])
def test_refusals_name_the_option_that_was_given(folder, argv, line):
    (folder / "runs/a").mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl"):
        (folder / "runs/a" / name).write_text("{}")
    with pytest.raises(ValueError) as refusal:
        c, alone = diagnose.parse(argv.split())
        diagnose.take_prompts(c, alone["prompts"], alone["count"])
    assert re.fullmatch(line, str(refusal.value))

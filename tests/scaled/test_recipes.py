"""Every recipe in scaled/configs: it loads, its processes can share the batch, and its arithmetic is right."""
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import transformers as tf

import scaled
from scaled.checks import check_fit
from scaled.config import read_config

FOLDER = Path(scaled.__file__).with_name("configs")
RECIPES = sorted(FOLDER.glob("*.toml"))
SLURM = FOLDER / "qwen3_30b_a3b_4_nodes.sbatch"
QWEN = tf.Qwen3MoeConfig(
    vocab_size=151936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4,
    head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, max_position_embeddings=40960,
    tie_word_embeddings=False)
MODELS = {  # the sizes that were published
    "checkpoints/Qwen3-30B-A3B": QWEN,
    "checkpoints/OLMoE-1B-7B-0125-Instruct": tf.OlmoeConfig(
        vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=16, num_experts=64, num_experts_per_tok=8, max_position_embeddings=4096,
        tie_word_embeddings=False),
    "checkpoints/granite-3.0-1b-a400m-instruct": tf.GraniteMoeConfig(
        vocab_size=49155, hidden_size=1024, intermediate_size=512, num_hidden_layers=24, num_attention_heads=16,
        num_key_value_heads=8, num_local_experts=32, num_experts_per_tok=8, max_position_embeddings=4096,
        tie_word_embeddings=True),
}


def comment(path):
    """The text in front of the options, in one line."""
    lines = path.read_text().partition("\ncheckpoint =")[0].splitlines()
    assert all(line.startswith("#") for line in lines)
    return " ".join(line.lstrip("# ").rstrip("\\ ") for line in lines)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_its_processes_share_the_batch(path):
    c, text = read_config(str(path), {}), comment(path)
    nodes, processes = re.search(
        rf"torchrun (?:--nnodes (\d+) )?--nproc-per-node (\d+) (?:--rdzv\S+ \S+ )*-m scaled.train --config "
        rf"scaled/configs/{path.name}", text).groups()
    world = int(nodes or 1) * int(processes)
    c.check_processes(world)
    assert ("Run by CI" in text) == (path.stem == "laptop") != ("Never run by us" in text)
    if path.stem != "laptop":
        assert f"python -m scaled.plan --config scaled/configs/{path.name} --gpus {world} " in text
        check_fit(c, MODELS[c.checkpoint])  # context, family and precision, on this machine's vLLM
    readme = FOLDER.with_name("README.md").read_text()
    assert path.name in readme


def test_no_recipe_is_missing():
    assert [path.stem for path in RECIPES] == [
        "granite_3_1b_a400m", "laptop", "olmoe_1b_7b", "qwen3_30b_a3b", "qwen3_30b_a3b_4_nodes"]


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem != "laptop"], ids=lambda path: path.stem)
def test_the_arithmetic_of_a_recipe(path):
    """Parameters counted, states at 16 bytes, what the engine has for its cache and how many rows that is."""
    c, text = read_config(str(path), {}), comment(path)
    config = MODELS[c.checkpoint]
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config)
    parameters = sum(p.numel() for p in model.parameters())
    billions, states = re.search(r"([\d.]+) billion parameters: fp32 weights, gradients, Adam's two moments, 16 bytes "
                                 r"each: (\d+)", text).groups()
    assert float(billions) == pytest.approx(parameters / 1e9, abs=0.006)
    assert int(states) == round(16 * parameters / 1e9)
    gpu = int(re.search(r"GPUs? (?:of|with) (\d+) GB", text)[1])
    awake = c.gpu_memory * gpu
    engine = text[text.index("engine: "):]
    weights = parameters * {"fp8": 1, "bf16": 2}[c.rollout_precision] / c.tensor_parallel / 1e9
    space, cache, kilobytes, tokens, rows = (float(x.replace(",", "")) for x in re.search(
        r"working space, (\d+); cache (\d+), at (\d+) kB a token (?:and GPU )?([\d,]+) tokens, (\d+) rows",
        engine).groups())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    exact = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim / c.tensor_parallel / 1e3
    assert kilobytes == round(exact) and cache == pytest.approx(awake - weights - space, abs=1)
    assert tokens == pytest.approx(cache * 1e6 / exact, abs=1e4) and rows == cache * 1e6 / exact // c.max_length
    kept = c.token_budget * config.hidden_size * config.num_hidden_layers * 2 / 1e9
    if match := re.search(r"tokens, \d+ wide, in bf16, ([\d.]+)", text):
        assert float(match[1]) == pytest.approx(kept, abs=0.06)
    # without offload weights and states are on the GPU in training, and in a checked sync with the engine
    world = int(re.search(r"--gpus (\d+)", text)[1])
    offloaded = 0 if c.cpu_offload else parameters / world / 1e9
    assert 16 * offloaded < 0.6 * gpu and awake + 12 * offloaded + 5 < gpu
    assert c.cpu_offload == (16 * parameters / world / 1e9 > 0.6 * gpu)


@pytest.mark.parametrize("saved", [False, True])
def test_the_slurm_script_starts_or_resumes(tmp_path, saved):
    """With stand-ins for SLURM's commands: torchrun gets the nodes and processes that SLURM was asked for."""
    for name, body in (("scontrol", 'printf "%s\\n" gpu-07 gpu-08 gpu-11 gpu-12'), ("srun", 'printf "%s\\n" "$@"')):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    if saved:
        (tmp_path / f"runs/{SLURM.stem}/update-000020").mkdir(parents=True)
    found = subprocess.run(
        ["bash", SLURM], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "gpu-[07-08,11-12]",
             "SLURM_JOB_ID": "42"})
    arguments = found.stdout.split("\n")[:-1]
    start = ["--resume", SLURM.stem] if saved else ["--config", f"scaled/configs/{SLURM.stem}.toml"]
    assert arguments == [
        "--kill-on-bad-exit=1", "torchrun", "--nnodes", "4", "--nproc-per-node", "8", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "gpu-07:29500", "--rdzv-id", "42", "--shutdown-timeout", "3600", "-m", "scaled.train",
        *start]
    asked = dict(re.findall(r"#SBATCH --(\S+?)=(\S+)", SLURM.read_text()))
    assert (asked["nodes"], asked["gpus-per-node"], asked["ntasks-per-node"]) == ("4", "8", "1")
    assert asked["signal"] == "TERM@3600"  # as long as torchrun is patient

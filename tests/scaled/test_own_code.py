"""A checkpoint with Python code of its own, of a family whose routers nobody listed: with --trust-remote-code
every loader runs that code, and with --replay none the family trains."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import nano_moe_rl as nano
from scaled.export import export_nano, transformers_twin

ROOT = Path(nano.__file__).parent
CODE = """
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig
from transformers import Qwen3MoeForCausalLM as Theirs

class OwnConfig(Qwen3MoeConfig):
    model_type = "own_moe"

class Qwen3MoeForCausalLM(Theirs):  # by this name vLLM knows what to run
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """checkpoint: no generation_config.json, so that the end token comes from the config."""
    folder = tmp_path_factory.mktemp("own")
    model, target = nano.Model(nano.Config(layers=2, experts=4)), folder / "checkpoint"
    export_nano(model, target)
    (target / "own.py").write_text(CODE)
    (target / "generation_config.json").unlink()
    twin = transformers_twin(model)  # packed, as this class has them: nobody converts its names
    save_file({name: x.clone() for name, x in twin.state_dict().items()}, target / "model.safetensors",
              metadata={"format": "pt"})
    for file, classes in (("config.json", {"AutoConfig": "own.OwnConfig",
                                           "AutoModelForCausalLM": "own.Qwen3MoeForCausalLM"}),
                          ("tokenizer_config.json", {"AutoTokenizer": [None, "own.OwnTokenizer"]})):
        content = json.loads((target / file).read_text())
        content["auto_map"] = classes
        content |= {"model_type": "own_moe"} if file == "config.json" else {"tokenizer_class": "OwnTokenizer"}
        (target / file).write_text(json.dumps(content))
    (folder / "train.jsonl").write_text("".join(
        json.dumps({"prompt": f"{a}{b}=", "answer": str((a + b) % 10)}) + "\n" for a in range(5) for b in range(5, 9)))
    (folder / "even.py").write_text(
        "def reward(prompts, texts, tokens): return [float(sum(row) % 2) for row in tokens]")
    (folder / "run.toml").write_text("""
checkpoint = "checkpoint"
train_data = "train.jsonl"
reward = "even:reward"
chat = false
updates = 4
mini_batches = 2
prompts = 4
group_size = 4
max_prompt = 4
max_response = 8
token_budget = 200
lr = 1e-3
train_precision = "fp32"
rollout_precision = "fp32"
check_sync_every = 2
""")
    return folder


def start(folder, *argv):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", *argv],
        cwd=folder, text=True, capture_output=True, timeout=240, env=os.environ | dict(
            PYTHONPATH=f"{ROOT}:{folder}", OMP_NUM_THREADS="1", HF_MODULES_CACHE=str(folder / "modules")))


def test_a_run_and_its_export(folder):
    done = start(folder, "scaled.train", "--config", "run.toml", "--trust-remote-code", "--replay", "none")
    assert done.returncode == 0, done.stderr
    assert "reward even:reward was tried on 20 of 20 rows" in done.stdout.splitlines()
    _, *rows = [json.loads(line) for line in (folder / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(row["routing_agreement"] is None and row["missing_routes"] == 0 for row in rows)
    assert all(row["grad_norm"] > 0 and row["mismatch_kl"] < 1e-8 for row in rows)
    assert rows[0]["staleness_kl"] < 1e-12 < rows[1]["staleness_kl"]
    done = start(folder, "scaled.export", "runs/run", "exported")
    assert done.returncode == 0, done.stderr
    trained, first = (AutoModelForCausalLM.from_pretrained(folder / name, trust_remote_code=True).state_dict()
                      for name in ("exported", "checkpoint"))
    assert all(0 < (trained[name] - first[name]).abs().max() < 0.1 for name in first)


@pytest.mark.parametrize("argv, line", [
    (["--replay", "none"], "trust_remote_code"),
    (["--trust-remote-code"], "does not know model_type 'own_moe'.*give --replay none")])
def test_without_one_of_the_options_it_is_refused(folder, argv, line):
    done = start(folder, "scaled.train", "--config", "run.toml", "--name", "refused", *argv)
    lines = [text for text in done.stderr.splitlines() if text.startswith("scaled: ")]
    assert done.returncode != 0 and len(lines) == 1
    assert re.search(line, lines[0]) and not (folder / "runs/refused").exists()

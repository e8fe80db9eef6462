"""Folders that cannot be loaded, or written to: each is refused in one line."""
import json
import shutil
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from families import CONFIGS, build
from processes import join_group
from safetensors.torch import load_file, save_file

from scaled.huggingface import save_pretrained
from scaled.policy import load_policy

PLAIN = dict(precision="fp32", logits_bytes=61 * 4 * 5, gradient_checkpointing=False,
             cpu_offload=False, device="cpu")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A process group of one, here, and a folder with one checkpoint."""
    folder = tmp_path_factory.mktemp("alone")
    join_group(0, 1, folder)
    config = deepcopy(CONFIGS["qwen3_moe"])
    config.tie_word_embeddings = True
    build(config).save_pretrained(folder / "good")
    yield folder
    dist.destroy_process_group()


def edited(folder, change):
    """A copy of the good checkpoint with change(its tensors, its config) applied."""
    target = folder / change.__name__
    shutil.copytree(folder / "good", target, dirs_exist_ok=True)
    tensors = load_file(target / "model.safetensors")
    config = json.loads((target / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


def missing(tensors, config):
    del tensors["model.norm.weight"], tensors["model.layers.2.mlp.experts.7.up_proj.weight"]

def left_over(tensors, config):
    tensors["model.layers.0.mlp.bias"] = torch.ones(3)

def misshapen(tensors, config):
    tensors["model.norm.weight"] = torch.ones(63)

def contradictory(tensors, config):
    tensors["lm_head.weight"] = torch.ones(61, 64)

def quantised(tensors, config):
    config["quantization_config"] = {"quant_method": "fp8"}

def dense(tensors, config):
    config.update(model_type="qwen3", architectures=["Qwen3ForCausalLM"])


@pytest.mark.parametrize("change, message", [
    (left_over, r"left over \[model.layers.0.mlp.bias\]"), (misshapen, "model.norm.weight is"),
    (contradictory, "ties"), (quantised, "quantised"), (dense, "no Mixture of Experts"),
    (missing, "model.layers.2.mlp.experts.gate_up_proj|model.norm.weight")])
def test_folders_that_do_not_fit_are_refused(alone, change, message):
    with pytest.raises(ValueError, match=message):
        load_policy(edited(alone, change), **PLAIN)


def test_folders_without_a_checkpoint_are_refused(alone, tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        load_policy(tmp_path / "nowhere", **PLAIN)
    shutil.copy(alone / "good" / "config.json", tmp_path)
    with pytest.raises(ValueError, match="convert it to safetensors"):
        load_policy(tmp_path, **PLAIN)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not there: model-1.safetensors, model-2.safetensors"):
        load_policy(tmp_path, **PLAIN)
    with pytest.raises(ValueError, match="precision 'fp16': give bf16 or fp32"):
        load_policy(alone / "good", **PLAIN | dict(precision="fp16"))


def test_left_padding_and_a_full_folder_are_refused(alone):
    policy = load_policy(alone / "good", **PLAIN)
    fed = torch.tensor([[False, True, True], [True, True, True]])
    with pytest.raises(ValueError, match="on the right"):
        policy(torch.ones(2, 4, dtype=torch.long), fed, 1.0)
    with pytest.raises(ValueError, match="has weights already"):
        save_pretrained(policy, alone / "good", None)

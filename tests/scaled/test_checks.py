"""Checkpoints of others that are damaged are refused in one line, before anything is loaded."""
import json
import re
import shutil

import pytest
import torch
from families import CONFIGS, build
from safetensors.torch import load_file, save_file

import nano_moe_rl as nano
from scaled.checks import read_material
from scaled.config import Config
from scaled.export import export_nano


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A good checkpoint in two shards, with a file of prompts."""
    folder = tmp_path_factory.mktemp("whole")
    export_nano(nano.Model(nano.Config(layers=2, experts=4)), folder / "hf")
    tensors = load_file(folder / "hf/model.safetensors")
    index = {}
    for i in range(2):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        part = {name: x for name, x in tensors.items() if ("layers.1." in name) == bool(i)}
        save_file(part, folder / "hf" / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "hf/model.safetensors").unlink()
    (folder / "hf" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "train.jsonl").write_text('{"prompt": "314=", "answer": "8"}\n')
    return folder


INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def cut(name, part):
    def damage(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:int(len(data) * part)])
    return damage


def write(name, text):
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def edit(name, **changes):
    """None takes a key away."""
    def damage(folder):
        values = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return damage


def tensors(file, change):
    def damage(folder):
        held = load_file(folder / file)
        change(held)
        save_file(held, folder / file, metadata={"format": "pt"})
    return damage


def all_in(change):
    """Every tensor in one file without an index, after a change."""
    def damage(folder):
        held = load_file(folder / ONE) | load_file(folder / TWO)
        change(held)
        remove(ONE, TWO, INDEX)(folder)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return damage


EXPERT, HEAD, NORM = "model.layers.1.mlp.experts.2.up_proj.weight", "lm_head.weight", "model.norm.weight"
DAMAGES = [
    ("config-gone", remove("config.json"), "has no config.json"),
    ("config-empty", write("config.json", ""), "its configuration cannot be used"),
    ("config-cut", cut("config.json", 0.5), "its configuration cannot be used"),
    ("config-list", write("config.json", "[]"), "its configuration cannot be used"),
    ("config-bytes", write("config.json", b"\xff\xfe\x00"), "its configuration cannot be used"),
    ("config-type-gone", edit("config.json", model_type=None), "its configuration cannot be used"),
    ("config-type-unknown", edit("config.json", model_type="made_up"), "its configuration cannot be used"),
    ("config-text-for-number", edit("config.json", num_hidden_layers="two"), "its configuration cannot be used"),
    ("config-wider", edit("config.json", hidden_size=128), "its weights cannot be used"),
    ("config-more-layers", edit("config.json", num_hidden_layers=3), "its weights cannot be used: .*missing"),
    ("config-fewer-layers", edit("config.json", num_hidden_layers=1), "its weights cannot be used: .*left over"),
    ("config-more-experts", edit("config.json", num_local_experts=5), "its weights cannot be used"),
    ("config-more-tokens", edit("config.json", vocab_size=14),
     "lm_head.weight is .13, 64., the model that its config describes has .14, 64."),
    ("config-experts", edit("config.json", num_experts_per_tok=5), "its config.json says 5 of 4 experts a token"),
    ("config-no-expert", edit("config.json", num_experts_per_tok=0), "its config.json says 0 of 4 experts a token"),
    ("config-no-step", edit("config.json", decoder_sparse_step=0), "its routes cannot be replayed: .*zero"),
    ("config-quantised", edit("config.json", quantization_config={"quant_method": "fp8"}), "that it is quantised"),
    ("weights-gone", remove(ONE, TWO, INDEX), "its weights cannot be used: .*has neither"),
    ("weights-pickled", lambda f: (remove(ONE, TWO, INDEX)(f), write("pytorch_model.bin", "x")(f)),
     "has neither .* convert it to safetensors"),
    ("shard-gone", remove(TWO), f"names files that are not there: {TWO}"),
    ("shard-cut", cut(TWO, 0.9), f"{TWO} is damaged"),
    ("shard-header-cut", cut(ONE, 0.001), f"{ONE} is damaged"),
    ("shard-empty", write(ONE, ""), f"{ONE} is damaged"),
    ("shard-text", write(ONE, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
     f"{ONE} is damaged"),
    ("shard-folder", lambda f: ((f / ONE).unlink(), (f / ONE).mkdir()), f"files that are not there: {ONE}"),
    ("shard-twice", lambda f: shutil.copy(f / ONE, f / TWO), f"{TWO} lacks tensors that {INDEX} says"),
    ("index-empty", write(INDEX, ""), f"{INDEX} is damaged"),
    ("index-cut", cut(INDEX, 0.5), f"{INDEX} is damaged"),
    ("index-no-map", write(INDEX, "{}"), f"{INDEX} is damaged"),
    ("index-list", write(INDEX, '{"weight_map": [1]}'), f"{INDEX} is damaged"),
    ("index-numbers", write(INDEX, '{"weight_map": {"a": 1}}'), f"{INDEX} is damaged"),
    ("index-outside", write(INDEX, '{"weight_map": {"a": "../train.jsonl"}}'), f"{INDEX} is damaged"),
    ("index-lacks-an-expert", lambda f: edit(INDEX, weight_map={
        name: file for name, file in json.loads((f / INDEX).read_text())["weight_map"].items() if name != EXPERT})(f),
     "its weights cannot be used: .*experts"),
    ("expert-gone", tensors(TWO, lambda x: x.pop(EXPERT)), f"{TWO} lacks tensors .*{EXPERT}"),
    ("head-gone", all_in(lambda x: x.pop(HEAD)), "missing .*lm_head"),
    ("expert-of-another-shape", all_in(lambda x: x.update({EXPERT: torch.zeros(3, 64)})), "its weights cannot be used"),
    ("norm-of-another-shape", all_in(lambda x: x.update({NORM: torch.zeros(3)})), "norm.weight is .3,."),
    ("a-tensor-too-many", all_in(lambda x: x.update(surplus=torch.zeros(3))), "left over .surplus"),
    ("weights-of-no-float", all_in(lambda x: x.update({NORM: torch.zeros(64, dtype=torch.int8)})),
     "its weights cannot be used: .*norm.weight is of type"),
    ("tokenizer-gone", remove("tokenizer.json"), "its tokenizer cannot be used"),
    ("tokenizer-all-gone", remove("tokenizer.json", "tokenizer_config.json"), "its tokenizer cannot be used"),
    ("tokenizer-empty", write("tokenizer.json", ""), "its tokenizer cannot be used"),
    ("tokenizer-cut", cut("tokenizer.json", 0.7), "its tokenizer cannot be used"),
    ("tokenizer-config-cut", cut("tokenizer_config.json", 0.7), "its tokenizer cannot be used"),
    ("generation-end-beyond", edit("generation_config.json", eos_token_id=[12, 13]),
     "its end tokens cannot be read: 13 is not one of the model's 13 tokens"),
    ("generation-end-below", edit("generation_config.json", eos_token_id=-1), "-1 is not one of the model's 13 tokens"),
    ("generation-end-bool", edit("generation_config.json", eos_token_id=True), "True is not one of the model's"),
    ("generation-end-text", edit("generation_config.json", eos_token_id="end"), "its end tokens cannot be read"),
    ("generation-cut", cut("generation_config.json", 0.5), "its end tokens cannot be read"),
]


def options(folder):
    return Config(name="x", checkpoint=str(folder / "hf"), train_data=str(folder / "train.jsonl"), chat=False,
                  reward="running_sum", max_prompt=6, max_response=22, prompts=2, group_size=2)


@pytest.mark.parametrize("damage, reason", [row[1:] for row in DAMAGES], ids=[row[0] for row in DAMAGES])
def test_a_damaged_checkpoint_is_refused_in_one_line(whole, tmp_path, damage, reason):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "hf")
    with pytest.raises(ValueError) as refusal:
        read_material(options(tmp_path))
    line = str(refusal.value)
    assert "\n" not in line and line.startswith(f"--checkpoint {tmp_path}/hf: ") and len(line) < 600, line
    assert re.search(reason, line), line


def test_a_whole_checkpoint_is_read(whole):
    material = read_material(options(whole))
    assert [prompt.tokens for prompt in material.prompts] == [[3, 1, 4, nano.ASK]]


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "ernie4_5_moe"])
@pytest.mark.parametrize("tied", [False, True])
def test_whole_checkpoints_of_families_pass_by_their_headers(tmp_path, family, tied):
    """Packed experts, one tensor an expert, saved buffers, and heads that share the embedding's weight."""
    from scaled.huggingface import check_weights
    config = type(CONFIGS[family])(**CONFIGS[family].to_dict() | {"tie_word_embeddings": tied})
    build(config).save_pretrained(tmp_path)
    check_weights(tmp_path, config, trust_remote_code=False)


def test_weights_and_biases_is_refused_without_its_package(monkeypatch):
    monkeypatch.setattr("scaled.checks.find_spec", lambda name: None if name == "wandb" else True)
    with pytest.raises(ValueError, match="^--wandb: the package is missing; pip install wandb$"):
        read_material(Config(checkpoint="c", train_data="d", wandb=True))

"""Hugging Face folders, which transformers and vLLM load, from checkpoints of both sizes.

    python -m scaled.export runs/run-1/checkpoint.pt DIR             # of nano_moe_rl.py
    python -m scaled.export runs/laptop DIR                          # the newest of a scaled run
    python -m scaled.export runs/laptop@40 DIR                       # that of update 40
    python -m scaled.export runs/laptop@best DIR                     # that with the best score
    torchrun --nproc-per-node 8 -m scaled.export runs/NAME DIR       # the same on several GPUs
"""

import json
import os
import shutil
import sys
from contextlib import redirect_stderr
from pathlib import Path

import torch

import nano_moe_rl as nano
from scaled.terminal import err


def transformers_twin(model: nano.Model):
    """The same policy as transformers' Qwen3MoeForCausalLM, with a copy of the weights."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    c = model.config
    twin = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=len(nano.VOCABULARY), hidden_size=c.width, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim,
        num_experts=c.experts, num_experts_per_tok=c.top_k, moe_intermediate_size=c.expert_width,
        norm_topk_prob=True,  # transformers' default is False
        tie_word_embeddings=False, rms_norm_eps=1e-6, rope_theta=1e4,
        max_position_embeddings=c.max_digits + 1 + c.max_response,
        bos_token_id=None, eos_token_id=nano.EOS, pad_token_id=nano.EOS))
    weights = {("" if name.startswith("lm_head") else "model.") + name: weight.cpu()
               for name, weight in model.state_dict().items()}
    twin.load_state_dict(weights, strict=True)
    return twin.eval()


def nano_tokenizer():
    """One token for each symbol of nano's vocabulary, with nano's ids."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: i for i, symbol in enumerate(nano.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=nano.VOCABULARY[nano.EOS]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    end = nano.VOCABULARY[nano.EOS]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)


def export_nano(model: nano.Model, folder: Path):
    """A Hugging Face folder with the weights, configuration and tokenizer of a nano policy."""
    transformers_twin(model).save_pretrained(folder)
    nano_tokenizer().save_pretrained(folder)


def export_cold_start(folder: Path, seed: int):
    """nano's cold start of a seed as a checkpoint to train from, with train.jsonl and eval.jsonl of
    its task, which have no prompt in common. ValueError if the folder is that of another seed."""
    mark = folder / "nano_seed"
    if folder.exists():
        if not mark.exists() or mark.read_text() != str(seed):
            raise ValueError(f"--checkpoint {folder}: is not the cold start of --seed {seed}; "
                             "remove it, or give another folder")
        return
    c, aside = nano.Config(seed=seed), folder.with_name("." + folder.name)
    shutil.rmtree(aside, ignore_errors=True)
    with redirect_stderr(err()):  # its bar is ours
        model = nano.cold_start(c)
    export_nano(model, aside)
    prompts, lengths = nano.make_prompts(20_000, c, torch.Generator().manual_seed(seed))
    tasks = dict.fromkeys(tuple(prompt[:length]) for prompt, length
                          in zip(prompts.tolist(), lengths.tolist()))  # each once, in order
    lines = [json.dumps({"prompt": "".join(nano.VOCABULARY[token] for token in task),
                         "answer": str(sum(task[:-1]) % 10)}) + "\n" for task in tasks]
    (aside / "eval.jsonl").write_text("".join(lines[:512]))
    (aside / "train.jsonl").write_text("".join(lines[512:]))
    (aside / mark.name).write_text(str(seed))
    aside.rename(folder)


def read_nano(path: str | Path) -> tuple[nano.Model, int]:
    """The policy in a checkpoint.pt of nano_moe_rl.py, and the updates that it has seen. ValueError
    for another file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model = nano.Model(nano.Config(**state["config"]))
        model.load_state_dict(state["model"])
        return model, state["rows"][-1]["update"]
    except Exception as error:  # some texts of torch give advice that would execute the file
        raise ValueError(f"{path} is no checkpoint of nano_moe_rl.py "
                         f"({type(error).__name__})") from error


def find_checkpoints(source: str) -> list[Path]:
    """What runs/NAME, runs/NAME@40 or runs/NAME/update-000040 stands for, oldest first. ValueError
    if there is none."""
    from scaled import checkpoint

    folder, at, update = source.rpartition("@")
    path = Path(source)
    if path.is_dir() and path in checkpoint.checkpoints(path.parent):
        return [path]
    if not path.exists() and at and update.isdecimal():
        saved = checkpoint.checkpoints(Path(folder))
        versions = {checkpoint.version_of(path): path for path in saved}
        if int(update) in versions:
            return [versions[int(update)]]
        raise ValueError(f"{folder} has no checkpoint of update {update}, only of "
                         f"{', '.join(map(str, versions)) or 'none'}")
    if not path.exists() and at and update == "best":
        if (found := checkpoint.best(checkpoint.checkpoints(Path(folder)))) is None:
            raise ValueError(f"{folder} has no checkpoint of an update with a score")
        return [found]
    if saved := checkpoint.checkpoints(path):
        return saved
    raise ValueError(f"{source} has no checkpoint: give a checkpoint.pt, the folder of a scaled "
                     "run, runs/NAME@UPDATE or @best, or the folder of one of its checkpoints")


def export_scaled(found: list[Path], folder: Path) -> int:
    """The newest whole one of these checkpoints as a Hugging Face folder -> its version. A
    collective. ValueError if none is whole, or the checkpoint that its run began from is gone."""
    from transformers import AutoTokenizer
    from scaled import checkpoint
    from scaled.huggingface import save_pretrained
    from scaled.policy import load_policy
    from scaled.ranks import RANK

    path, line = checkpoint.newest_whole(found)
    if line and RANK == 0:
        print(f"scaled: {line}", file=sys.stderr)
    options = json.loads((path / checkpoint.OPTIONS).read_text())
    trust = dict(trust_remote_code=options["trust_remote_code"])
    policy = load_policy(options["checkpoint"], precision="fp32", logits_bytes=1,
                         gradient_checkpointing=False, cpu_offload=options["cpu_offload"],
                         device=nano.DEVICE, **trust)
    version = checkpoint.load(path, policy, None)
    tokenizer = AutoTokenizer.from_pretrained(options["checkpoint"], **trust)
    save_pretrained(policy, folder, tokenizer)
    return version


def main(argv: list[str]) -> int:
    from scaled.ranks import RANK, Ranks, refuse

    if len(argv) != 2:
        refuse("give a checkpoint and a new folder: python -m scaled.export CHECKPOINT DIR")
    source, folder = Path(argv[0]), Path(argv[1])
    if os.path.lexists(folder):
        refuse(f"{folder} exists: give a new folder")
    if os.path.isfile(source):
        if RANK == 0:
            try:
                model, updates = read_nano(source)
            except ValueError as error:
                refuse(str(error))
            export_nano(model, folder)
            print(f"{folder} has the policy after {updates} updates")
        return 0
    try:
        found = find_checkpoints(argv[0])
    except (ValueError, OSError) as error:
        refuse(str(error))
    ranks = Ranks()
    try:
        version = export_scaled(found, folder)
    except ValueError as error:
        ranks.fail(str(error), code=2)
    except OSError as error:  # a full disk
        ranks.fail(f"rank {RANK}: {error}; {folder} is not complete: remove it", 1)
    except BaseException as error:
        ranks.fail(f"rank {RANK}: {type(error).__name__}: {error}", 1, error)
    if RANK == 0:
        print(f"{folder} has the policy after {version} updates")
    ranks.end()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""TRL's GRPOTrainer on a benchmark's shape. Runs in TRL's own environment; see speed.py, scaled_trl.py.

    python trl_step.py --cell '{"precision": "fp32", "steps": 12}'     # the shape of speed.py
    python trl_step.py --cell '{"precision": "fp32", "steps": 12, "folder": …, "prompts": …, …}'   # a checkpoint's

Prints one JSON object: seconds of each step after the first two, and of these what generation took.
"""
import json
import sys
import tempfile
import time

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM,
                          TrainerCallback)
from trl import GRPOConfig, GRPOTrainer

WARM_UP = 2


def clock() -> float:
    """As in timing.py, which needs packages that are not here."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


class StepTimes(TrainerCallback):
    def __init__(self):
        self.seconds, self.last = [], clock()

    def on_step_end(self, args, state, control, **kwargs):
        now = clock()
        self.seconds.append(now - self.last)
        self.last = now


class Trainer(GRPOTrainer):
    generated: list[float] = []

    def _generate(self, *args, **kwargs):
        began = clock()
        result = super()._generate(*args, **kwargs)
        self.generated.append(clock() - began)
        return result


def shape_of_speed(steps: int) -> dict:
    """That of speed.py: its model, 16 prompts an update of 8 digits and a sign of 13 symbols, 16 x 11 tokens."""
    digits = torch.randint(10, (16 * steps, 8), generator=torch.Generator().manual_seed(0)).tolist()
    return dict(prompts=[row + [10] for row in digits], prompts_a_step=16, group=16, response=11, vocabulary=13)


def main(c: dict):
    torch.manual_seed(0)
    if "folder" in c:
        model = AutoModelForCausalLM.from_pretrained(c["folder"], dtype=torch.float32)
    else:
        c = shape_of_speed(c["steps"]) | c
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
            vocab_size=13, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            head_dim=32, num_experts=16, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True,
            tie_word_embeddings=False, eos_token_id=12, pad_token_id=12, bos_token_id=12))
    words = {str(i): i for i in range(c["vocabulary"])}
    end = str(model.config.eos_token_id or 0)  # a checkpoint may have none; no response may end early anyhow
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=end))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end)
    data = Dataset.from_dict({"prompt": [" ".join(map(str, row)) for row in c["prompts"]]})
    lengths, asked = set(), {tuple(row) for row in c["prompts"]}

    def reward(prompts, completion_ids, **kwargs):
        lengths.update(map(len, completion_ids))
        assert {tuple(map(int, text.split())) for text in prompts} <= asked
        return [float(ids[-1] < c["vocabulary"] / 2) for ids in completion_ids]

    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder, max_steps=c["steps"], per_device_train_batch_size=c["prompts_a_step"] * c["group"],
            num_generations=c["group"], max_completion_length=c["response"], beta=0.0, learning_rate=1e-3,
            use_cpu=not torch.cuda.is_available(), bf16=c["precision"] == "bf16", gradient_checkpointing=False,
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, max_grad_norm=1.0,
            generation_kwargs={"min_new_tokens": c["response"]})
        Trainer(model, reward, args, train_dataset=data, processing_class=tokenizer, callbacks=[times]).train()
    assert lengths == {c["response"]}, lengths
    print(json.dumps(dict(seconds=times.seconds[WARM_UP:], rollout=Trainer.generated[WARM_UP:])))


if __name__ == "__main__":
    main(json.loads(sys.argv[sys.argv.index("--cell") + 1]))

"""TRL's GRPOTrainer on the benchmark shape. Runs in TRL's own environment; see speed.py.

    python trl_step.py fp32|bf16 STEPS      # prints one JSON line: seconds of each step
"""

import json
import sys
import tempfile
import time

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

PROMPTS, GROUP, PROMPT_TOKENS, RESPONSE_TOKENS = 16, 16, 9, 11


class StepTimes(TrainerCallback):
    def __init__(self):
        self.seconds, self.last = [], time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def main(precision: str, steps: int):
    vocabulary = {symbol: i for i, symbol in enumerate("0123456789=:$")}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="$"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="$", pad_token="$")
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=13, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, num_experts=16, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True,
        tie_word_embeddings=False, eos_token_id=12, pad_token_id=12, bos_token_id=12))
    generator = torch.Generator().manual_seed(0)
    digits = torch.randint(10, (PROMPTS * steps, PROMPT_TOKENS - 1), generator=generator).tolist()
    data = Dataset.from_dict({"prompt": ["".join(map(str, row)) + "=" for row in digits]})
    lengths = set()

    def reward(completion_ids, **kwargs):
        lengths.update(map(len, completion_ids))
        return [float(ids[-1] < 5) for ids in completion_ids]

    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=PROMPTS * GROUP,
            num_generations=GROUP, max_completion_length=RESPONSE_TOKENS, beta=0.0, learning_rate=1e-3,
            use_cpu=not torch.cuda.is_available(), bf16=precision == "bf16", gradient_checkpointing=False, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, max_grad_norm=1.0,
            generation_kwargs={"min_new_tokens": RESPONSE_TOKENS})
        GRPOTrainer(model, reward, args, train_dataset=data, processing_class=tokenizer,
                    callbacks=[times]).train()
    assert lengths == {RESPONSE_TOKENS}, lengths
    print(json.dumps(times.seconds[2:]))  # the first steps warm up


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

"""Facts from outside that a plan rests on, each with its source: GPUs, published configurations,
published outcomes. Numbers only; what follows from them is computed elsewhere."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """Dense rates, of tensor cores without sparsity; bandwidths in one direction."""
    gib: float  # what CUDA sees, which is less than the name says
    bf16_tflops: float
    fp8_tflops: float  # 0: it has no fp8 units
    hbm_tb_s: float  # of its own memory, 10^12 bytes a second
    nvlink_gb_s: float  # to the GPUs of its node, 10^9 bytes a second
    network_gb_s: float  # its own adapter's, in the vendor's nodes of 8
    host_gb_s: float  # PCIe, 16 lanes
    price: float  # dollars an hour, an assumption of this day:
    priced: str


# Rates: NVIDIA's data sheets of the A100 80GB SXM, H100 SXM, H200 SXM and DGX B200; where they
# give a rate with sparsity, half of it. Memory: the "total capacity" in messages of
# torch.OutOfMemoryError on these GPUs. Adapters: DGX A100 has 200 Gb/s a GPU, the others 400.
# Prices: middle of the range on demand at specialised clouds, by www.mercatus-ai.com
# (cloud-gpu-pricing), the B200's by lyceum.technology (nvidia-b200-gpu-cloud-pricing-2026). Between
# providers they differ by a factor of three: give --price.
GPUS = {
    "a100": GPU(79.14, 312, 0, 2.039, 300, 25, 32, 1.30, "May 2026"),
    "h100": GPU(79.18, 989, 1979, 3.35, 450, 50, 64, 3.00, "May 2026"),
    "h200": GPU(139.81, 989, 1979, 4.8, 450, 50, 64, 4.00, "May 2026"),
    "b200": GPU(178.35, 2250, 4500, 8.0, 900, 50, 64, 5.25, "March 2026"),
}


@dataclass(frozen=True)
class Published:
    model_type: str
    config: dict  # arguments of transformers' configuration: what decides sizes, no more
    total: int  # parameters: bytes of the published bf16 tensors, halved
    active: str  # billions of them that a token meets, in the digits of the model card


# From config.json of the repositories on Hugging Face, which begin with Qwen/, allenai/,
# ibm-granite/ and mistralai/; totals from the index or the headers of their safetensors; active
# parameters from model cards, OLMoE's from arXiv 2409.02060.
MODELS = {
    "Qwen3-30B-A3B": Published("qwen3_moe", dict(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, moe_intermediate_size=768,
        num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, tie_word_embeddings=False,
        max_position_embeddings=40960),
        30_532_122_624, "3.3"),
    "Qwen3-235B-A22B": Published("qwen3_moe", dict(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=94,
        num_attention_heads=64, num_key_value_heads=4, head_dim=128, moe_intermediate_size=1536,
        num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, tie_word_embeddings=False,
        max_position_embeddings=40960),
        235_093_634_560, "22"),
    "OLMoE-1B-7B": Published("olmoe", dict(
        vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16,
        num_attention_heads=16, num_key_value_heads=16, num_experts=64, num_experts_per_tok=8,
        norm_topk_prob=False, tie_word_embeddings=False, max_position_embeddings=4096),
        6_919_161_856, "1.3"),
    "Granite-3.0-1B-A400M": Published("granitemoe", dict(
        vocab_size=49155, hidden_size=1024, intermediate_size=512, num_hidden_layers=24,
        num_attention_heads=16, num_key_value_heads=8, num_local_experts=32,
        num_experts_per_tok=8, tie_word_embeddings=True, logits_scaling=6.0,
        max_position_embeddings=4096),
        1_334_628_352, "0.4"),
    "Mixtral-8x7B": Published("mixtral", dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
        sliding_window=None, tie_word_embeddings=False, max_position_embeddings=32768),
        46_702_792_704, "12.9"),
    "Qwen1.5-MoE-A2.7B": Published("qwen2_moe", dict(
        vocab_size=151936, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24,
        num_attention_heads=16, num_key_value_heads=16, moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632, num_experts=60, num_experts_per_tok=4,
        tie_word_embeddings=False, max_position_embeddings=8192),
        14_315_784_192, "2.7"),
}

# What the paper of MiniRL reports (arXiv 2512.01374 v3, figures 1 to 4; scores read off the
# figures, ±.003): Qwen3-30B-A3B, fp8 rollouts, single runs. (N, replay, clip) -> benchmark, fate,
# which is given in updates.
OUTCOMES = {
    (1, "none", True): "peak .787, stable for 1200",
    (1, "R3", True): ".74 at 800, stable, no gain",
    (2, "none", False): "peak .752, fails near 1000",
    (2, "R2", False): "peak .784, fails from 1600",
    (2, "R2", True): "peak .80, stable for 2400",
    (2, "R3", True): "peak .775, stable for 1710",
    (4, "none", True): "collapses early (in text)",
    (4, "R2", True): "below R3 (in text)",
    (4, "R3", True): "above R2 (in text)",
    (8, "R2", False): "peak .770, fails near 1360",
    (8, "R2", True): "peak .783, fails after 3200",
    (8, "R3", True): ".78 to .79, holds for 5480",
}

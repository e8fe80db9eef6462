"""A tiny random checkpoint of every family that routing replay knows, small enough for vLLM too.

L, A and E differ from each other and, where a family can, some layers are dense."""
import torch
import transformers as tf

SIZE = dict(vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
            num_experts_per_tok=3, tie_word_embeddings=False, pad_token_id=None, bos_token_id=None,
            eos_token_id=None)
DEEPSEEK = dict(n_routed_experts=12, n_shared_experts=2, n_group=3, topk_group=2,
                moe_intermediate_size=32, first_k_dense_replace=1, routed_scaling_factor=1.7)
# vLLM's CPU kernel for latent attention is compiled for the sizes of the real checkpoints only
LATENT = dict(kv_lora_rank=512, q_lora_rank=48, qk_nope_head_dim=32, qk_rope_head_dim=64,
              v_head_dim=32, num_key_value_heads=2)
SHARED = dict(num_experts=10, moe_intermediate_size=32, shared_expert_intermediate_size=48)
HYBRID = dict(head_dim=32, layer_types=["linear_attention", "linear_attention", "full_attention",
                           "linear_attention"],
              linear_key_head_dim=64, linear_value_head_dim=64, linear_num_key_heads=2,
              linear_num_value_heads=4)


def size(**changes):
    """Arguments of one config. Each gets its own rotary settings: some configs write into them."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return {**SIZE, "rope_parameters": rope, **changes}


CONFIGS = {
    "qwen2_moe": tf.Qwen2MoeConfig(**size(**SHARED, decoder_sparse_step=2, num_hidden_layers=5)),
    "qwen3_moe": tf.Qwen3MoeConfig(
        **size(num_experts=10, moe_intermediate_size=32, head_dim=32, mlp_only_layers=[1],
               norm_topk_prob=True)),
    "qwen3_next": tf.Qwen3NextConfig(**size(**SHARED, **HYBRID)),
    "qwen3_5_moe": tf.Qwen3_5MoeTextConfig(**size(**SHARED, **HYBRID)),
    "mixtral": tf.MixtralConfig(**size(num_local_experts=7, num_experts_per_tok=2)),
    "olmoe": tf.OlmoeConfig(**size(num_experts=10)),
    "deepseek_v2": tf.DeepseekV2Config(
        **size(**DEEPSEEK | LATENT | dict(topk_method="group_limited_greedy"))),
    # topk_method, scoring_func and use_routing_bias are what vLLM reads in published configs
    "deepseek_v3": tf.DeepseekV3Config(
        **size(**DEEPSEEK | LATENT, topk_method="noaux_tc", scoring_func="sigmoid")),
    "glm4_moe": tf.Glm4MoeConfig(**size(**DEEPSEEK, head_dim=32)),
    "gpt_oss": tf.GptOssConfig(**size(num_local_experts=10, head_dim=32, rope_parameters=None)),
    "granitemoe": tf.GraniteMoeConfig(**size(num_local_experts=10)),
    "minimax_m2": tf.MiniMaxM2Config(
        **size(num_local_experts=10, head_dim=32, rotary_dim=16, scoring_func="sigmoid",
               use_routing_bias=True)),
    "ernie4_5_moe": tf.Ernie4_5_MoeConfig(
        **{k: v for k, v in size().items() if k != "num_experts_per_tok"},
        moe_k=3, moe_num_experts=10, moe_intermediate_size=32, moe_layer_interval=2,
        moe_layer_start_index=1),
    "dots1": tf.Dots1Config(**size(**DEEPSEEK, norm_topk_prob=True)),
}


def build(config, seed: int = 0):
    """The model of a config, fp32, with weights large enough that routes differ between tokens. A
    correction bias is made non-zero: at zero nobody would notice that it is missing."""
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                weight.normal_(std=0.1)
            elif weight.dim() > 1:
                weight.normal_(std=weight.shape[-1] ** -0.5)
    return model

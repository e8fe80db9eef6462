"""The functions of nano_moe_rl.py on real MoE checkpoints: vLLM rollouts, FSDP2 training."""

"""What a plan assumes beside the options of a run: the machine, its rates, the lengths of texts."""

from dataclasses import dataclass, fields, replace
from functools import cached_property

from nano_moe_rl import check, check_options, option
from scaled.config import Config
from scaled.facts import GPU, GPUS

TABLE = "; 0: that of scaled/facts.py"


@dataclass(frozen=True)
class Machine:
    """The options of a plan. ValueError, in one line, if one is refused."""
    model: str = option("", "folder with a config.json, or a model of scaled/facts.py")
    metrics: str = option("", "metrics.jsonl of a run, whose seconds replace the stated rates")
    metrics_gpus: int = option(0, "processes of that run; 0: --gpus", low=0)
    gpus: int = option(8, "processes, one a GPU", high=2**16)
    gpu: str = option("h100", "whose facts hold", *GPUS)
    gib: float = option(0.0, f"memory of a GPU that CUDA sees{TABLE}", low=0)
    bf16_tflops: float = option(0.0, f"dense, of a GPU{TABLE}", low=0)
    fp8_tflops: float = option(0.0, f"dense, of a GPU{TABLE}", low=0)
    hbm_tb_s: float = option(0.0, f"bandwidth of a GPU's memory{TABLE}", low=0)
    nvlink_gb_s: float = option(0.0, f"in one direction, within a node{TABLE}", low=0)
    network_gb_s: float = option(0.0, f"of one GPU's adapter{TABLE}", low=0)
    host_gb_s: float = option(0.0, f"of one GPU's way to host memory{TABLE}", low=0)
    price: float = option(0.0, f"dollars an hour and GPU{TABLE}", low=0)
    node_gpus: int = option(8, "GPUs of a node", high=2**16)
    host_gib: float = option(1900.0, "host memory of a node")

    # assumptions that nobody has measured here
    mean_prompt: float = option(0.0, "tokens; 0: half of --max-prompt", low=0)
    mean_response: float = option(0.0, "tokens; 0: a third of --max-response", low=0)
    eval_prompts: int = option(90, "held-out prompts of a score", low=0)
    train_efficiency: float = option(
        0.2, "share of the GPU's rate that training reaches", low=0.001, high=1)
    rollout_efficiency: float = option(
        0.5, "share of the GPU's rates that vLLM reaches", low=0.001, high=1)
    link_efficiency: float = option(
        0.8, "share of a bandwidth between devices that is reached", low=0.001, high=1)
    step_ms: float = option(5.0, "of vLLM in each step, beside the GPU's work", low=0)
    reduce_us: float = option(15.0, "of an all-reduce between GPUs of one engine", low=0)
    tensor_ms: float = option(0.3, "of a sync for each tensor of the checkpoint", low=0)
    reward_ms: float = option(5.0, "of the reward for each response", low=0)
    disk_gb_s: float = option(2.0, "that a node writes or reads of a checkpoint", low=0.001)
    engine_gib: float = option(4.0, "vLLM's activations and CUDA graphs, in its share", low=0)
    context_gib: float = option(3.0, "CUDA, NCCL and a sleeping engine on each GPU", low=0)
    fragmentation: float = option(
        0.05, "of what the trainer has on a GPU, lost between its blocks", low=0, high=1)
    process_gib: float = option(8.0, "of host memory for each process", low=0)

    def __post_init__(m):
        check_options(m)
        check(m, "gpus", m.gpus <= m.node_gpus or m.gpus % m.node_gpus == 0,
              f"a multiple of --node-gpus {m.node_gpus}")

    nodes = property(lambda m: -(-m.gpus // m.node_gpus))

    @cached_property
    def facts(m) -> GPU:
        """The table's, and over them those that are given."""
        given = {f.name: value for f in fields(GPU) if (value := getattr(m, f.name, None))}
        return replace(GPUS[m.gpu], **given)

    @property
    def link(m) -> float:
        """Bytes a second that a collective brings to each GPU. In rings over several nodes every
        adapter of a node works for all of its GPUs: NVLink, or node_gpus · network if that is
        less (NCCL's bus bandwidth, github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md)."""
        within = m.facts.nvlink_gb_s
        if m.nodes > 1:
            within = min(within, m.node_gpus * m.facts.network_gb_s)
        return within * 1e9 * m.link_efficiency

    def peak(m, precision: str) -> float:
        """FLOP/s of a GPU. int8 is weights only, multiplied in bf16; fp32 has no tensor cores in
        torch by default, and about a sixteenth of bf16's rate."""
        return 1e12 * {"fp8": m.facts.fp8_tflops, "fp32": m.facts.bf16_tflops / 16}.get(
            precision, m.facts.bf16_tflops)

    def check_run(m, c: Config, heads: int):
        """ValueError if this machine cannot start the run at all."""
        c.check_processes(m.gpus)
        check(c, "tensor_parallel", heads % c.tensor_parallel == 0,
              f"a divisor of the model's {heads} attention heads")
        check(c, "rollout_precision", m.peak(c.rollout_precision) > 0,
              f"bf16 or int8: --gpu {m.gpu} has no fp8 units")

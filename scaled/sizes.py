"""What a configuration says about sizes: parameters, widths of the layers, caches. No weights: the
model is transformers' own, on the meta device, and what it is made of is read off its tensors."""

import math
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from scaled.config import Config
from scaled.facts import MODELS

# Families of transformers whose routers cast their weights back to the precision of a bf16 pass
BF16_ROUTING = ("qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "ernie4_5_moe")
ROUTERS = (".gate.weight", ".router.weight")
MOST_LAYERS = 512  # a configuration with more is an error, and would take hours to be built

Shapes = tuple[tuple[int, ...], ...]


@cache
def count(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes))


@cache
def shard(shapes: Shapes, ranks: int) -> int:
    """Elements that FSDP2 keeps of these parameters on its fullest rank. It cuts the first axis
    into equal parts, the last of which is padded (torch, fully_shard: torch.chunk): of 128 experts
    none is ever cut, so that more than 128 ranks share them no further."""
    return sum(math.ceil(shape[0] / ranks) * math.prod(shape[1:]) for shape in shapes)


@dataclass(frozen=True)
class Layer:
    """A decoder layer; widths in elements a token."""
    experts: Shapes  # of the packed experts (E, ...); () in a dense layer
    rest: Shapes  # of its other parameters
    matrices: int  # elements of those that fp8 rollouts quantise: no router, no norm
    queries: int
    keys: int  # as wide as the values
    normed: bool  # queries and keys have norms of their own
    expert: int  # hidden width of an expert, 0 in a dense layer
    mlp: int  # that of the dense network, or of the shared expert

    @cached_property
    def shapes(layer) -> Shapes:
        return layer.experts + layer.rest


@dataclass(frozen=True)
class Sizes:
    name: str
    source: str  # of the sizes, in words
    width: int  # D
    vocabulary: int  # V
    heads: int
    kv_heads: int
    moe_layers: int  # L
    top_k: int  # A
    n_experts: int  # E
    layers: tuple[Layer, ...]
    root: Shapes  # final norm and head
    embedding: Shapes  # () if it is tied, and so the head
    published_tensors: int  # in a checkpoint with a matrix for each expert
    fp32_routing: bool  # bf16 passes have routing weights, and so weighted outputs, in fp32

    total = property(lambda s: count(s.shapes))

    @cached_property
    def shapes(s) -> Shapes:
        return s.embedding + s.root + tuple(shape for layer in s.layers for shape in layer.shapes)

    @cached_property
    def experts(s) -> Shapes:
        return tuple(shape for layer in s.layers for shape in layer.experts)

    @cached_property
    def widest(s) -> Layer:
        return max(s.layers, key=lambda layer: count(layer.shapes))

    @property
    def active(s) -> int:
        """Parameters that a token meets: all but the experts it is not sent to, the embedding
        included, as the model cards count."""
        unused = count(s.experts) * (s.n_experts - s.top_k)
        return s.total - unused // s.n_experts

    @property
    def cache_bytes(s) -> int:
        """Of keys and values of one token in bf16, all layers: 2 · width · 2 bytes a layer."""
        return sum(2 * layer.keys * 2 for layer in s.layers)

    @property
    def route_bytes(s) -> int:
        """Of one token: L · A ids of uint8, or of int16 above 256 experts (rollout.py)."""
        return s.moe_layers * s.top_k * (1 if s.n_experts <= 256 else 2)

    def bytes_in(s, precision: str, experts: float, rest: float) -> float:
        """Of so many elements of experts, and of all else, in the engine. fp8 quantises the
        matrices of the layers but routers, int8 the experts alone; the others stay bf16
        (quantisation.py). Scales, one a row, are left out."""
        if precision == "fp8":
            matrices = min(rest, sum(layer.matrices for layer in s.layers))
            return experts + 2 * rest - matrices
        return {"fp32": 4, "bf16": 2, "int8": 1}[precision] * experts + (
            4 if precision == "fp32" else 2) * rest


def read_configuration(c: Config, model: str):
    """-> a name, where the sizes are from, and transformers' configuration: of `model`, a folder or
    a model of facts.MODELS, else of the checkpoint that the options name. A folder without files,
    whose name begins like that of a published model, stands for it. ValueError if there is none."""
    from transformers import AutoConfig
    from scaled.checks import refusing

    source = Path(model or c.checkpoint)
    flag = f"--model {model}" if model else f"--checkpoint {c.checkpoint}"
    if (source / "config.json").is_file():
        with refusing(f"{flag}: its configuration cannot be used"):
            return source.name, "its config.json", AutoConfig.from_pretrained(
                source, trust_remote_code=c.trust_remote_code)
    if not model and c.nano_cold_start:
        import nano_moe_rl as nano
        from scaled.export import transformers_twin
        twin = transformers_twin(nano.Model(nano.Config(seed=c.seed)))
        return source.name, "the cold start of nano_moe_rl.py", twin.config
    known = [name for name in MODELS if source.name.lower().startswith(name.lower())]
    if not known:
        raise ValueError(f"{flag}: has no config.json; give --model the folder of one, or one of "
                         f"{', '.join(MODELS)}")
    published = MODELS[max(known, key=len)]
    return source.name, "the published configuration", AutoConfig.for_model(
        published.model_type, **published.config)


def measure(name: str, source: str, config) -> Sizes:
    """The sizes of a configuration. ValueError for one that describes no Mixture of Experts, for
    quantised weights, and for attention whose memory these files do not describe."""
    import torch
    from transformers import AutoModelForCausalLM
    from scaled.checks import refusing
    from scaled.families import knows, route_shape

    text, where = config.get_text_config(), f"the model of {name}"
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{where} has quantised weights: training needs them in bf16 or fp32")
    n_layers = getattr(text, "num_hidden_layers", None)
    if not isinstance(n_layers, int) or not 0 < n_layers <= MOST_LAYERS:
        raise ValueError(f"{where} has {n_layers!r} layers; give one of 1 to {MOST_LAYERS}")
    with refusing(f"{where} cannot be built"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        decoder = list(model.base_model.layers)
    layers = tuple(measure_layer(where, layer) for layer in decoder)
    sparse = [layer for layer in layers if layer.experts]
    if not sparse:
        raise ValueError(f"{where} is no Mixture of Experts")
    L, A, E = route_shape(config) if knows(config) else (
        len(sparse), getattr(text, "num_experts_per_tok", None), sparse[0].experts[0][0])
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    if not all(isinstance(x, int) and x > 0 for x in (A, E, heads, kv_heads)) or A > E:
        raise ValueError(f"{where} has impossible numbers of heads or experts")
    apart = {id(p) for layer in decoder for p in layer.parameters()}
    first, last = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    embedding = () if first is last else (tuple(first.shape),)
    apart |= {id(first)} if embedding else set()
    root = tuple(tuple(p.shape) for p in model.parameters() if id(p) not in apart)
    published = sum(len(layer.rest) + 3 * E * bool(layer.experts) for layer in layers)
    published += len(root) + len(embedding)
    return Sizes(name, source, text.hidden_size, text.vocab_size, heads, kv_heads, L, A, E, layers,
                 root, embedding, published, text.model_type not in BF16_ROUTING)


def measure_layer(where: str, layer) -> Layer:
    """One decoder layer of transformers, by the names that its families share."""
    shapes = {key: tuple(p.shape) for key, p in layer.named_parameters()}
    width = {key.rsplit(".weight")[0].rpartition(".")[2]: shape[0] for key, shape in shapes.items()}
    if "q_proj" not in width or any("sinks" in key for key in shapes):
        raise ValueError(f"{where} has attention of a kind that the plan has no formula for; it "
                         "knows grouped queries")
    experts = {key: shape for key, shape in shapes.items() if ".experts." in key}
    down = next((shape for key, shape in experts.items() if key.endswith("down_proj")), None)
    mlp = next((shape[0] for key, shape in shapes.items()
                if key.endswith("gate_proj.weight") and key not in experts), 0)
    rest = {key: shape for key, shape in shapes.items() if key not in experts}
    return Layer(
        tuple(experts.values()), tuple(rest.values()),
        count(tuple(shape for key, shape in rest.items() if len(shape) == 2
                    and key.endswith(".weight") and not key.endswith(ROUTERS))),
        width["q_proj"], width["k_proj"], "q_norm" in width, down[2] if down else 0, mlp)

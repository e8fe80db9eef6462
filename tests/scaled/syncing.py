"""What tests of the sync share: the trainer's pass over given routes, and every weight of a model."""
import torch

from nano_moe_rl import token_logprobs
from scaled.replay import routed

SEQUENCES = [[(7 * i * i + 3 * j) % 53 for i in range(18 + j)] for j in range(12)]


def logprobs_of(model):
    """The trainer's pass, with the engine's routes replayed."""
    @torch.no_grad()
    def run(tokens, lengths, routing):
        fed = torch.arange(1, tokens.shape[1]) < lengths[:, None]
        with routed(model, routing, fed):
            logits = model(tokens[:, :-1], attention_mask=fed.long()).logits
        return token_logprobs(logits, tokens[:, 1:])
    return run


def weights(model):
    """As named_weights of a sharded policy: a tied weight once."""
    seen = set()
    for name, x in model.state_dict(keep_vars=True).items():
        if id(x) not in seen:
            seen.add(id(x))
            yield name, x.detach()

"""Which runs there are, and why. A run is a cell (a regime, N and a method) and a seed.

Three dials, one at a time, at one learning rate: numerics of the rollouts, noise in their router,
updates per rollout batch (N). A method differs from "none" in what its name says. A seed is one cold
start and one order of prompts, shared by all cells.
"""
from dataclasses import dataclass

import nano_moe_rl as nano
from scaled import objectives
from scaled.study import Study

# The base recipe. Rollouts, rewards and all numbers of every update come from the default model; a
# correct response to six digits has 15 tokens, so 16 are enough, and are faster than the default.
BASE = dict(mini_batch=128, updates=160, lr=5e-4, max_digits=6, max_response=16, eval_every=80, eval_prompts=1024)
QUICK = dict(width=32, heads=1, layers=2, expert_width=16, cold_start_steps=30, max_response=9, mini_batch=8,
             eval_every=16, eval_prompts=32)

REGIMES = {  # the options that the name stands for
    "fp32": dict(rollout_precision="fp32"),  # no gap between the engines: the precondition
    "mild": dict(rollout_precision="fp8"),
    "router": dict(rollout_precision="fp8", router_noise=0.8),  # the gap is one of routing, share > .9
    "noise .3": dict(rollout_precision="fp8", router_noise=0.3),
    "noise .5": dict(rollout_precision="fp8", router_noise=0.5),
    "noise 1": dict(rollout_precision="fp8", router_noise=1.0),
    "dense": dict(rollout_precision="fp8", router_noise=0.8, experts=2, top_k=2),  # nothing to choose
}
# Longer prompts and smaller batches: here numerics alone can be a cliff. So many steps compound the teacher's slips:
# with .22 of them no cold start passes .2, however long (pilot: .197 after 2,000 updates, .193 after 3,000).
LONG = dict(min_digits=7, max_digits=8, max_response=20, mini_batch=64, slip_rate=0.15, cold_start_steps=900)
REGIMES |= {f"long {name}": dict(rollout_precision=name) | LONG | dict(updates=320)
            for name in ("fp32", "fp8", "int6", "int5", "int4")}
# On these prompts the default model passes .8 within 128 updates, and what has nothing left to gain cannot fail. Half its
# width, two layers and a quarter of an expert learn slowly: fp32 rollouts end between .6 and .7 (pilot, two seeds). And
# long chains let little pass: with router noise .3 and more nothing is learned, with R3 neither (pilot, a seed each).
REGIMES["long noise .15"] = dict(rollout_precision="fp8", router_noise=0.15) | LONG
REGIMES |= {f"{name}, 1,024 updates": REGIMES[name] | dict(width=32, heads=1, layers=2, expert_width=16, lr=3e-4,
                                                           updates=1024, eval_every=128)
            for name in ("long fp32", "long fp8", "long int5", "long int4", "long noise .15")}
# Symbols that the task never needs, each with a little probability: the default run has 13 in all.
REGIMES["router, 1,024 symbols"] = REGIMES["router"]
SYMBOLS = {"router, 1,024 symbols": 1024}
TEACHER_OPTIONS = {"brief": dict(), "equation": dict(max_response=22, slip_rate=0.25),
                   "restating": dict(max_response=22, slip_rate=0.28)}
REGIMES |= {f"teacher {name}": dict(rollout_precision="fp8", teacher=name) | options
            for name, options in TEACHER_OPTIONS.items()}

R3, STALENESS = dict(replay="R3"), dict(importance_sampling="staleness")
METHODS = {  # all with clipping, unless the name says otherwise; it does nothing at N = 1
    "none": {}, "R2": dict(replay="R2"), "R3": R3,
    "none, no clip": dict(clip=False), "R2, no clip": dict(replay="R2", clip=False),
    "R3, no clip": R3 | dict(clip=False),
    "no IS": STALENESS, "R3, no IS": R3 | STALENESS, "sequence IS": dict(importance_sampling="sequence"),
    "length norm": dict(length_norm=True),
    "DPPO": {}, "GRPO": {}, "CISPO": {},
    "no clip, half the lr": dict(clip=False, lr=BASE["lr"] / 2),  # does clipping only make steps smaller?
    "random drop": {},  # does it only make them noisier? As many tokens as the gate would drop
    "frozen router": {},  # a router that cannot learn: what remains of flips is the noise
    "R3 on the response": R3,  # the prompt keeps the training engine's experts
    "IcePop": {}, "MIS-token": {}, "MIS": {}, "OPSM": {}, "R3, gate weights": R3,
    "lag": {}, "lag, R3": R3, "lag, DPPO": {}, "lag, slower steps": {},
}
LOSSES = {  # name: (loss, advantages), where they are not MiniRL's
    "GRPO": (objectives.grpo_loss, objectives.standardised_advantages),
    "CISPO": (objectives.cispo_loss, objectives.standardised_advantages),
    "DPPO": (objectives.dppo_loss, nano.group_advantages),
    "random drop": (objectives.random_drop_loss, nano.group_advantages),
    "lag, DPPO": (objectives.dppo_loss, nano.group_advantages),
} | {name: (objectives.OBJECTIVES[name].loss, nano.group_advantages) for name in ("IcePop", "MIS-token", "MIS", "OPSM")}
# As old, in updates, as the last of LITTLE staleness; but every batch, and by time.
LAG = 7
STUDIES = {  # name: what is put around the single file
    "R3, gate weights": Study(gate_weights=True),
    "lag": Study(lag=LAG), "lag, R3": Study(lag=LAG), "lag, DPPO": Study(lag=LAG),
    "lag, slower steps": Study(lag=LAG, lr_by="response"),
}


@dataclass(frozen=True)
class Cell:
    regime: str
    N: int
    method: str

    @property
    def key(self) -> str:
        return f"{self.regime} | N={self.N} | {self.method}"

    @property
    def symbols(self) -> int:
        return SYMBOLS.get(self.regime, len(nano.VOCABULARY))

    def config(self, seed: int, quick: bool = False) -> nano.Config:
        options = BASE | dict(replay="none", mini_batches=self.N) | REGIMES[self.regime] | METHODS[self.method]
        if self.N > 8:  # few rollout batches: a score after each
            options["eval_every"] = max(self.N, options["updates"] // 10)
        if quick:
            options |= QUICK | dict(updates=max(16, self.N))
        return nano.Config(seed=seed, name="figures", **options)


@dataclass(frozen=True)
class Block:
    """Cells that are run together, seed by seed, so that comparisons stay paired wherever it stops."""
    name: str
    cells: list[Cell]
    seeds: range
    why: str


def cells(regimes: list[str], Ns: list[int], methods: list[str]) -> list[Cell]:
    """All of them, but for those that on-policy equal another: R2 is none there, and no gate closes."""
    return [Cell(regime, N, method) for regime in regimes for N in Ns for method in methods
            if N > 1 or method not in ("R2", "none, no clip")]


# Fresh seeds: 200 to 203 served earlier trials, 900 to 949 the pilot of this grid. None is dropped.
SIXTEEN, EIGHT, FOUR, TWO = (range(1000, 1000 + n) for n in (16, 8, 4, 2))
PILOT_SEEDS = range(900, 950)
# The paper's N = 2 is N = 8 here, its N = 4 and 8 are N = 32: a pilot (two seeds, no router noise, none
# with replay) saw runs without clipping fail at N = 16 and 32 and not below. LITTLE and MUCH staleness.
LITTLE, MUCH = 8, 32

BLOCKS = [  # in the order in which they are run
    Block("precondition", cells(["fp32"], [1], ["none"]), EIGHT,
          "the base recipe without any gap: it must fail in no seed, or nothing may be compared"),
    Block("primary", cells(["router"], [1, LITTLE], ["none", "R3"]), SIXTEEN,
          "replay against none where the gap is one of routing, on-policy and off-policy"),
    Block("primary, other corrections",
          cells(["router"], [1], ["no IS"]) + cells(["router"], [LITTLE], ["R2"]), EIGHT,
          "does dropping the importance weight, or replaying the trainer's own experts, do as well?"),
    Block("much staleness", cells(["router"], [MUCH], ["none", "R2", "R3", "none, no clip", "R3, no clip"]), EIGHT,
          "replay and clipping where weights are stale"),
    Block("no gap in routing", cells(["mild"], [1], ["none", "R3"]), EIGHT,
          "the same comparison with fp8 alone, whose gap replay closes by less than half"),
    Block("on-policy ablations", cells(["router"], [1], ["R3, no IS", "length norm", "DPPO"]), EIGHT,
          "the rest of the published figure 1, and a mask that is anchored on μ"),
    Block("control: dense", cells(["dense"], [1], ["none", "R3"]), EIGHT,
          "as many active experts as there are: replay must do nothing"),
    Block("off-policy without clipping", cells(["router"], [LITTLE], ["none, no clip"])
          + cells(["router"], [MUCH], ["R2, no clip", "DPPO"]), EIGHT, "what is left of the published figures 2 to 4"),
    Block("control: clipping",
          cells(["mild"], [MUCH], ["none", "none, no clip", "no clip, half the lr", "random drop"]), EIGHT,
          "does clipping only make steps smaller, or noisier?"),
    Block("cold starts", [Cell(f"teacher {name}", LITTLE, "R2") for name in TEACHER_OPTIONS], EIGHT,
          "do runs from three teachers converge?"),
    Block("control: routing", cells(["router"], [LITTLE], ["frozen router", "R3 on the response"]), EIGHT,
          "is it the router that learns, or the prompt's experts?"),
    Block("dial: numerics",
          cells(["long fp32", "long fp8", "long int6", "long int5", "long int4"], [1], ["none"]), EIGHT,
          "at which rounding does the recipe fall, all else equal?"),
    Block("dial: routing", cells(["noise .3", "noise .5", "noise 1"], [1], ["none", "R3"]), EIGHT,
          "from which noise on does replay pay?"),
    Block("dial: staleness", cells(["mild"], [1, 2, 4, 8, 16, MUCH], ["none", "none, no clip"]), EIGHT,
          "from which N on does clipping pay, at one learning rate?"),
    Block("long arms", cells(["long fp32, 1,024 updates"], [1], ["none"])
          + cells(["long noise .15, 1,024 updates"], [1], ["none", "R3", "no IS"])
          + cells(["long int4, 1,024 updates", "long int5, 1,024 updates"], [1], ["none", "no IS"])
          + cells(["long fp8, 1,024 updates"], [MUCH], ["none", "none, no clip"]), EIGHT,
          "one of each kind over 1,024 updates of the longest prompts, in a model that cannot learn them all"),
    Block("importance weight", cells(["long int4"], [1], ["no IS"])
          + cells(["router, 1,024 symbols"], [1], ["none", "no IS"]), EIGHT,
          "where does it matter? A systematic error, and symbols of low probability; the long arms look too"),
    Block("other corrections to sixteen seeds",
          cells(["router"], [1], ["no IS"]) + cells(["router"], [LITTLE], ["R2"]), SIXTEEN, "as the primary cells"),
    Block("crossings", cells(["fp32", "mild", "noise .5", "router"], [1, 2, LITTLE, MUCH], ["none", "R2", "R3"])
          + cells(["long int4"], [16], ["none", "R2", "R3", "none, no clip"]), FOUR,
          "numerics or routing against staleness, as maps"),
]


# Seeds that a claim about a cell waits for.
PLANNED = {cell.key: max(len(block.seeds) for block in BLOCKS if cell in block.cells)
           for block in BLOCKS for cell in block.cells}

# Corrections beside replay, and rollouts that are old by time; into a file of their own, since no claim asks for them.
# Three cells of BLOCKS are run once more beside them, so that what is compared shares a machine and its cold starts.
CORRECTIONS = [
    Block("objectives and masks",
          cells(["router"], [1], ["none", "R3", "IcePop", "MIS-token", "MIS", "OPSM", "GRPO", "CISPO"]), EIGHT,
          "the same rollouts' gap, in training: which mask or objective does as well as R3?"),
    Block("gate weights", cells(["router"], [1], ["R3, gate weights"]), EIGHT,
          "is a router that cannot learn a price worth paying for a smaller gap?"),
    Block("old by time", cells(["mild"], [1], ["none", "lag", "lag, R3", "lag, DPPO", "lag, slower steps"]), EIGHT,
          "rollouts seven batches old against eight updates a batch: does replay help, a mask on μ, a slower step?"),
]


def minutes(cell: Cell) -> float:
    """Of a core, as measured on a shared EPYC: an update of 128 responses takes .17 s, one of 64 .1 s."""
    c = cell.config(0)
    evaluations = c.updates / max(c.eval_every, cell.N)
    return (c.updates * (0.03 + 0.14 * c.mini_batch / 128) + 1.2 * evaluations) / 60

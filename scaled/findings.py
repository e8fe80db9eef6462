"""What scaled.diagnose found, as a table and as a picture."""
import shutil
import textwrap

from scaled import gap
from scaled.config import Config


def table(found: dict, c: Config) -> str:
    """For people, as wide as their terminal."""
    width = min(shutil.get_terminal_size().columns, 120)

    def wrap(text: str, indent: str = "  ") -> str:
        return textwrap.fill(text, width, subsequent_indent=indent, break_on_hyphens=False)

    columns = [found[name] for name in ("own", "replayed") if name in found]
    rows = [("|Δ log p|, mean", "mean", "9.1e"), ("99th percentile", "p99", "9.1e"),
            ("largest", "max", "9.1e"), ("equal in every bit", "equal_bits", "9.1%"),
            ("k1", "k1", "9.1e"), ("k3, KL(μ‖π)", "k3", "9.1e"),
            ("F(2), ratio beyond 2", "extreme_token_fraction", "9.1e"),
            ("effective sample size", "effective_sample_size", "9.4f"),
            (f"weights above {gap.CAP:g}", "truncated_fraction", "9.1e")]
    lines = [wrap(f"{c.checkpoint}: {found['tokens']} tokens of {found['responses']} responses, "
                  f"engine {c.rollout_precision}, trainer {c.train_precision}"), "",
             f"{'the trainer with':24}" + "".join(f"{name:>16}" for name in
                                                  ("its own experts", "those of μ")[:len(columns)])]
    lines += [f"{text:24}" + "".join(f"{column[name]:16{kind[1:]}}" for column in columns)
              for text, name, kind in rows]
    low = ["0", *map(str, gap.BUCKETS)]
    for i, (a, b) in enumerate(zip(low, low[1:] + ["1"])):
        tokens = columns[0]["by_probability"][i]["tokens"]
        if tokens:
            means = "".join(f"{column['by_probability'][i]['mean']:16.1e}" for column in columns)
            lines.append(f"{f'|Δ|, μ in ({a}, {b}]':24}{means}{tokens:9} tokens")
    if "agreement_by_layer" in found:
        worst, L = min(found["agreement_by_layer"]), len(found["agreement_by_layer"])
        share, first = found["routing_share"], found["first_layer_that_differs"]
        most = f"; first to differ is most often layer {first.index(max(first))}"
        lines += ["", wrap(f"same experts: {sum(found['agreement_by_layer']) / L:.2%} of (token, "
                           f"layer), {worst:.2%} in layer "
                           f"{found['agreement_by_layer'].index(worst)}, the lowest of {L}"),
                  wrap(f"tokens with other experts somewhere: {sum(first):.2%}"
                       + (most if sum(first) else "")),
                  wrap("same experts by position: " + ", ".join(
                      f"from {part['from']} {part['agreement']:.2%}"
                      for part in found["agreement_by_position"])),
                  "routing share, what replay closes of KL(μ‖π): " + (
                      f"{share:.0%}" if share is not None else "there is no gap")]
    advice = found["recommendation"]
    lines += [""] + [wrap(f"FAULT: {fault}") for fault in found["faults"]]
    if not found["faults"]:
        lines += [wrap("both syncs of artificial weights arrived; no fault found" + (
            "" if c.temperature != 1 else "; one of temperature shows only at another than 1"))]
        lines += [f"recommended: replay {advice['replay']}, N up to {advice['mini_batches']}, "
                  f"rollouts in {advice['precision']}"]
    return "\n".join(lines + [wrap(f"  because {text}", "    ") for text in advice["because"]])


def draw(found: dict, path: str):
    """|Δ log p| by size and by probability, same experts by layer and by position."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6), layout="constrained")
    sizes, probabilities, layers, positions = figure.subplots(2, 2).flat
    names = [f"≤ {edge:g}" for edge in gap.EDGES] + [f"> {gap.EDGES[-1]:g}"]
    buckets = [f"≤ {edge:g}" for edge in (*gap.BUCKETS, 1)]
    for i, (name, label) in enumerate((("own", "its own experts"), ("replayed", "those of μ"))):
        if name in found:
            style = dict(width=0.4, label=f"trainer with {label}", hatch=["", "//"][i])
            sizes.bar([x + 0.4 * i for x in range(len(names))],
                      [n / found["tokens"] for n in found[name]["histogram"]], **style)
            probabilities.bar([x + 0.4 * i for x in range(len(buckets))],
                              [part["mean"] or 0 for part in found[name]["by_probability"]],
                              **style)
    for axes, labels in (sizes, names), (probabilities, buckets):
        axes.set_xticks([x + 0.2 for x in range(len(labels))], labels, fontsize=8)
        axes.legend()
    sizes.set(title="|log π - log μ| of a token, nats", ylabel="share of tokens")
    probabilities.set(title="mean by the token's probability under μ", ylabel="nats")
    layers.set(title="same experts in both engines, by MoE layer", xlabel="layer")
    positions.set(title="same experts, by position", xlabel="from position")
    if "agreement_by_layer" in found:
        layers.plot(found["agreement_by_layer"], marker=".")
        parts = found["agreement_by_position"]
        positions.plot([str(part["from"]) for part in parts],
                       [part["agreement"] for part in parts], marker=".")
    layers.xaxis.get_major_locator().set_params(integer=True)
    for axes in (layers, positions):
        axes.grid(alpha=0.3)
        axes.set_ylim(top=1.0)
    figure.savefig(path, dpi=100)

"""
The report of a comparison: tables as Markdown, and two pictures that can be read in black and
white and by colour-blind people: every variant has a marker of its own, in the colours of Okabe and
Ito. tools/compare.py makes the rows, which are the lines of results.jsonl.
"""

import importlib.util
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from model import GPTConfig
from nanomla.distributed import warn0
from nanomla.files import replacing
from tools.bench.timing import Rows, markdown

MARKERS = "osD^vPX*<>hp"
COLORS = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#808080",
)


def best_runs(rows: Rows, equal: str = "tokens") -> dict[str, Rows]:
    """The finished runs of every variant at its best rate, one for each seed."""
    best: dict[str, Rows] = {}
    for row in rows:
        if row["best_rate"] and row["equal"] == equal and "val_loss" in row:
            best.setdefault(row["variant"], []).append(row)
    return best


def mean_and_spread(runs: Rows) -> tuple[float, float]:
    """Mean and standard deviation of the final losses; 0 for the deviation of one."""
    losses = [run["val_loss"] for run in runs]
    if len(losses) == 1:
        return losses[0], 0.0
    return statistics.mean(losses), statistics.stdev(losses)


def loss_cells(runs: Rows, first: Rows | None) -> dict[str, str]:
    """
    The loss of a variant, its distance from the first one's, whose runs may have failed, and the
    probability that equal variants are as far apart, if there are several seeds of both.
    """
    mean, spread = mean_and_spread(runs)
    cells = {"loss": f"{mean:.4f}", "change": "", "p": ""}
    if len(runs) > 1:
        cells["loss"] += f" ± {spread:.4f}"
    if first is None:
        return cells
    cells["change"] = f"{mean - mean_and_spread(first)[0]:+.4f}"
    if runs is not first and min(len(runs), len(first)) > 1:
        p = welch_p_value([run["val_loss"] for run in runs], [run["val_loss"] for run in first])
        cells["p"] = f"{p:.3f}"
        if p > 0.05:
            cells["p"] += ", not distinguishable"
    return cells


def welch_p_value(a: list[float], b: list[float]) -> float:
    """
    The two-sided p-value of Welch's t-test, which takes no variances to be equal: the probability
    that two samples of one distribution have means as far apart as those of a and b.
    """
    noise = [statistics.variance(sample) / len(sample) for sample in (a, b)]
    if sum(noise) == 0:
        return float(statistics.mean(a) == statistics.mean(b))
    t = abs(statistics.mean(a) - statistics.mean(b)) / math.sqrt(sum(noise))
    parts = [x**2 / (len(sample) - 1) for x, sample in zip(noise, (a, b), strict=True)]
    n = sum(noise) ** 2 / sum(parts)  # degrees of freedom
    # Student's density of x = sqrt(n) tan(angle), which is a power of the cosine
    first = math.atan(t / math.sqrt(n))
    width = (math.pi / 2 - first) / 10_000
    angles = first + width * (np.arange(10_000) + 0.5)
    constant = math.exp(math.lgamma((n + 1) / 2) - math.lgamma(n / 2)) / math.sqrt(math.pi)
    return float(2 * constant * width * np.sum(np.cos(angles) ** (n - 1)))


# ---- Text and tables
def report_text(
    title: str | None, rows: Rows, rates: dict[str, float], context: int, where: str
) -> str:
    """
    The report as Markdown. rates: tokens/s of the variants, decoded at this context, or {} if that
    was not timed. where: the machine, in words.
    """
    done = [row for row in rows if "val_loss" in row]
    lines = [f"# {title or 'Attention compared'}", "", recipe(done, where), ""]
    lines += main_table(rows, rates, context)
    if any(row["equal"] == "parameters" for row in done):
        lines += ["", "## Equal parameters", "", *equal_table(rows)]
    if len({row["lr_factor"] for row in done}) > 1:
        lines += ["", "## Learning rates", "", *rate_table(rows)]
    lines += ["", "![loss over the cache's size](loss_cache.png)"]
    lines += ["", "![loss over seconds of training](loss_seconds.png)"]
    failed = [row for row in rows if "error" in row]
    if failed:
        lines += ["", "## Failed", ""]
    for row in failed:
        run = f"equal {row['equal']}, rate x {row['lr_factor']:g}, seed {row['seed']}"
        lines.append(f"- {row['variant']}, {run}: {row['error']}")
    return "\n".join(lines)


def recipe(done: Rows, where: str) -> str:
    """What the runs have in common, in words."""
    model = done[0]["model"]
    tokens = {row["tokens"] for row in done}
    shape = f"{model['n_layer']} layers, {model['n_embd']} wide, {model['block_size']} tokens"
    text = f"{done[0]['dataset']}; {shape} of context; {range_text(tokens)} tokens a run. {where}."
    seeds = {len(runs) for runs in best_runs(done).values()}
    if max(seeds) > 1:
        text += f" Losses are means over {range_text(seeds)} seeds at the variant's best rate, with"
        text += " their standard deviation."
    positions: dict[str, dict[str, None]] = {}  # the variants that have each kind, in order
    for row in done:
        positions.setdefault(row["model"]["pos_emb"], {})[row["variant"]] = None
    if len(positions) > 1:
        kinds = [f"{kind}: {', '.join(variants)}" for kind, variants in positions.items()]
        text += f" Positions differ: {'; '.join(kinds)}."
    if len({row["dataset"] for row in done}) > 1:
        text += " **The runs have different datasets: their losses cannot be compared.**"
    return text


def range_text(values: set[int]) -> str:
    """The least and the most of some numbers."""
    if len(values) == 1:
        return f"{min(values):,}"
    return f"{min(values):,} to {max(values):,}"


def main_table(rows: Rows, rates: dict[str, float], context: int) -> list[str]:
    """Costs and losses of the variants, trained on equally many tokens."""
    several_rates = len({row["lr_factor"] for row in rows}) > 1
    best = best_runs(rows)
    first = best.get(rows[0]["variant"])
    table = []
    for name, runs in best.items():
        run = runs[0]
        line = {"variant": name, "cached numbers a layer": "a state"}
        if run["cached_numbers"]:
            line["cached numbers a layer"] = f"{run['cached_numbers']:g}"
        line["cache bytes/token"] = f"{run['cache_bytes']:,.0f}"
        line["parameters"] = f"{run['parameters']:,}"
        line["of attention"] = f"{run['attention_parameters']:,}"
        line["GFLOP/iteration"] = f"{run['training_flops'] / 1e9:.2f}"
        times = [run["ms"] for run in runs if run["ms"]]
        line["ms/iteration"] = f"{statistics.median(times):.1f}" if times else ""
        if several_rates:
            line["best rate"] = f"x {run['lr_factor']:g}"
        line |= loss_cells(runs, first)
        if rates:
            line[f"decoded tokens/s at {context:,}"] = f"{rates[name]:,.0f}"
        table.append(line)
    return markdown(table)


def equal_table(rows: Rows) -> list[str]:
    """The same with as many parameters as the first variant."""
    best = best_runs(rows, "parameters")
    first = best.get(rows[0]["variant"])
    table = []
    for name, runs in best.items():
        run = runs[0]
        line = {"variant": name, "MLP width": str(GPTConfig(**run["model"]).hidden)}
        line["parameters"] = f"{run['parameters']:,}"
        line["beside the first"] = ""
        if first is not None:
            line["beside the first"] = f"{run['parameters'] / first[0]['parameters'] - 1:+.2%}"
        line["GFLOP/iteration"] = f"{run['training_flops'] / 1e9:.2f}"
        table.append(line | loss_cells(runs, first))
    return markdown(table)


def rate_table(rows: Rows) -> list[str]:
    """Losses at every learning rate, of the first seed."""
    factors = sorted({row["lr_factor"] for row in rows})
    losses: dict[str, dict[float, float]] = {row["variant"]: {} for row in rows}
    for row in rows:
        if row["equal"] == "tokens" and row["seed"] == rows[0]["seed"] and "val_loss" in row:
            losses[row["variant"]][row["lr_factor"]] = row["val_loss"]
    table = []
    edges = []
    for name, at_rate in losses.items():
        line = {"variant": name}
        for factor in factors:
            line[f"x {factor:g}"] = "failed"
            if factor in at_rate:
                line[f"x {factor:g}"] = f"{at_rate[factor]:.4f}"
        table.append(line)
        best = min(at_rate, key=at_rate.get, default=None)
        if best in (factors[0], factors[-1]):
            edges.append(f"{name} (x {best:g})")
    lines = markdown(table)
    if edges:
        lines += ["", f"At the edge of the rates tried: {', '.join(edges)}."]
    return lines


# ---- Pictures
def can_draw() -> bool:
    """Whether matplotlib is there; if not, a warning."""
    if importlib.util.find_spec("matplotlib") is None:
        warn0("no pictures: they need matplotlib")
        return False
    return True


def new_axes(xlabel: str, ylabel: str = "validation loss (nats per token)") -> Any:
    """The axes of a new figure of matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    return figure.add_subplot(xlabel=xlabel, ylabel=ylabel)


def save(axes: Any, path: Path) -> None:
    """Write a figure with its grid and its legend."""
    axes.grid(alpha=0.3)
    axes.figure.legend(loc="outside right upper", fontsize="small")
    with replacing(path) as unfinished:
        axes.figure.savefig(unfinished, dpi=100, format="png")


def draw(rows: Rows, folder: Path) -> None:
    """loss_cache.png and loss_seconds.png; nothing without matplotlib."""
    if can_draw():
        draw_cache(best_runs(rows), best_runs(rows, "parameters"), folder / "loss_cache.png")
        draw_seconds(best_runs(rows), folder / "loss_seconds.png")


def style(i: int) -> dict[str, Any]:
    """The marker and the colour of a variant."""
    return {"marker": MARKERS[i % len(MARKERS)], "color": COLORS[i % len(COLORS)]}


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points than which none is smaller in the one without being larger in the other."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def draw_cache(tokens: dict[str, Rows], parameters: dict[str, Rows], path: Path) -> None:
    """
    The final loss over cache bytes per token, full marks for equal tokens, whose Pareto front is
    drawn, and empty ones for equal parameters.
    """
    axes = new_axes("cache bytes per token at the trained context")
    axes.set_xscale("log", base=2)
    mark = {"ls": "", "capsize": 4, "lw": 1}
    sizes = set()
    points = []
    for i, (name, runs) in enumerate(tokens.items()):
        size = runs[0]["cache_bytes"]
        sizes.add(round(size))
        loss, spread = mean_and_spread(runs)
        points.append((size, loss))
        axes.errorbar(size, loss, spread, label=name, ms=7, **mark, **style(i))
        if name in parameters:
            loss, spread = mean_and_spread(parameters[name])
            axes.errorbar(size, loss, spread, fillstyle="none", ms=9, **mark, **style(i))
    front_sizes, front_losses = zip(*pareto(points), strict=True)
    axes.plot(front_sizes, front_losses, "--", color="gray", lw=1, label="Pareto front")
    if parameters:
        axes.plot([], [], "o", color="gray", fillstyle="none", ms=9, label="equal parameters")
    axes.set_xticks(sorted(sizes), [f"{x:,}" for x in sorted(sizes)], rotation=30)
    axes.minorticks_off()
    save(axes, path)


def draw_seconds(best: dict[str, Rows], path: Path) -> None:
    """
    The validation loss over seconds of training, of the median run in time of every variant,
    without that of the start, which is far above.
    """
    axes = new_axes("seconds of training, evaluations and start-up included")
    for i, (name, runs) in enumerate(best.items()):
        curves = [run["curve"][1:] for run in runs if len(run["curve"]) > 1]
        if not curves:
            continue
        curves.sort(key=lambda points: points[-1][1])
        _, seconds, losses = zip(*curves[len(curves) // 2], strict=True)
        line = ("-", "--", "-.", ":")[i % 4]
        axes.plot(seconds, losses, line, lw=1.2, ms=6, label=name, **style(i))
    save(axes, path)

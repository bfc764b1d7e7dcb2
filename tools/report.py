"""
The report of a comparison: tables as Markdown, and two pictures that can be read in black and
white and by colour-blind people: every variant has a marker of its own, in the colours of Okabe and
Ito. tools/compare.py makes the rows, which are the lines of results.jsonl.
"""

import statistics
import sys
from pathlib import Path
from typing import Any

from model import GPTConfig
from tools.bench.timing import markdown

MARKERS = "osD^vPX*<>hp"
COLORS = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#808080",
)  # fmt: skip
Rows = list[dict[str, Any]]


def names(rows: Rows) -> list[str]:
    """The variants, in the order of the rows."""
    return list(dict.fromkeys(row["variant"] for row in rows))


def repeated(rows: Rows, variant: str, equal: str = "tokens") -> Rows:
    """The finished runs of a variant at its best rate, one for every seed."""
    mine = [row for row in rows if row["variant"] == variant and row["equal"] == equal]
    return [row for row in mine if row["best_rate"] and "val_loss" in row]


def mean_and_spread(rows: Rows) -> tuple[float, float]:
    """Mean and standard deviation of the final losses; 0 for the deviation of one."""
    losses = [row["val_loss"] for row in rows]
    return statistics.mean(losses), statistics.stdev(losses) if len(losses) > 1 else 0.0


def report_text(cfg: Any, rows: Rows, rates: dict[str, float], where: str, extra: list[str]) -> str:
    """The report as Markdown. rates: decoded tokens/s of the variants; extra: further lines."""
    lines = [f"# {cfg.title or 'Attention compared'}", ""]
    done = [row for row in rows if "val_loss" in row]
    if not done:
        lines += [f"{where}."]
    else:
        lines += [recipe(done, where), "", *main_table(cfg, rows, rates)]
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
            at = f"equal {row['equal']}, rate x {row['lr_factor']:g}, seed {row['seed']}"
            lines.append(f"- {row['variant']}, {at}: {row['error']}")
    return "\n".join([*lines, *extra])


def recipe(done: Rows, where: str) -> str:
    """What the runs have in common, in words."""
    model, tokens = done[0]["model"], {row["tokens"] for row in done}
    shape = f"{model['n_layer']} layers, {model['n_embd']} wide, {model['block_size']} tokens"
    text = f"{done[0]['dataset']}; {shape} of context; {_range(tokens)} tokens a run. {where}."
    seeds = {len(repeated(done, name)) for name in names(done)}
    if max(seeds) > 1:
        text += f" Losses are means over {_range(seeds)} seeds at the variant's best rate, with"
        text += " their standard deviation."
    positions: dict[str, list[str]] = {}
    for row in done:
        positions.setdefault(row["model"]["pos_emb"], []).append(row["variant"])
    if len(positions) > 1:
        those = [f"{kind}: {', '.join(dict.fromkeys(v))}" for kind, v in positions.items()]
        text += f" Positions differ: {'; '.join(those)}."
    if len({row["dataset"] for row in done}) > 1:
        text += " **The runs have different datasets: their losses cannot be compared.**"
    elif len(tokens) > 1:
        text += " The runs have seen different numbers of tokens."
    return text


def _range(values: set[int]) -> str:
    few = sorted({min(values), max(values)})
    return " to ".join(f"{v:,}" for v in few)


def main_table(cfg: Any, rows: Rows, rates: dict[str, float]) -> list[str]:
    """Costs and losses of the variants, trained on equally many tokens."""
    table, first = [], None
    for name in names(rows):
        mine = repeated(rows, name)
        if not mine:
            continue
        run, (loss, spread) = mine[0], mean_and_spread(mine)
        first = loss if name == names(rows)[0] else first
        numbers = f"{run['cached_numbers']:g}" if run["cached_numbers"] else "a state"
        row = {"variant": name, "cached numbers a layer": numbers}
        row["cache bytes/token"] = f"{run['cache_bytes']:,.0f}"
        row["parameters"] = f"{run['parameters']:,}"
        row["of attention"] = f"{run['attention_parameters']:,}"
        row["GFLOP/iteration"] = f"{run['training_flops'] / 1e9:.2f}"
        ms = [r["ms"] for r in mine if r["ms"]]
        row["ms/iteration"] = f"{statistics.median(ms):.1f}" if ms else ""
        if len({r["lr_factor"] for r in rows}) > 1:
            row["best rate"] = f"x {run['lr_factor']:g}"
        row["loss"] = f"{loss:.4f}" + (f" ± {spread:.4f}" if len(mine) > 1 else "")
        row["change"] = "" if first is None else f"{loss - first:+.4f}"
        if rates:
            row[f"decoded tokens/s at {cfg.decode_context:,}"] = f"{rates[name]:,.0f}"
        table.append(row)
    return markdown(table)


def equal_table(rows: Rows) -> list[str]:
    """The same with as many parameters as the first variant."""
    table, first = [], None
    for name in names(rows):
        mine = repeated(rows, name, "parameters")
        if not mine:
            continue
        run, (loss, spread) = mine[0], mean_and_spread(mine)
        first = (run["parameters"], loss) if name == names(rows)[0] else first
        aside, change = ("", "") if first is None else (
            f"{run['parameters'] / first[0] - 1:+.2%}", f"{loss - first[1]:+.4f}"
        )  # fmt: skip
        row = {"variant": name, "MLP width": str(GPTConfig(**run["model"]).hidden)}
        row["parameters"] = f"{run['parameters']:,}"
        row["beside the first"] = aside
        row["GFLOP/iteration"] = f"{run['training_flops'] / 1e9:.2f}"
        row["loss"] = f"{loss:.4f}" + (f" ± {spread:.4f}" if len(mine) > 1 else "")
        table.append(row | {"change": change})
    return markdown(table)


def rate_table(rows: Rows) -> list[str]:
    """Losses at every learning rate, of the first seed."""
    factors = sorted({row["lr_factor"] for row in rows})
    table, edges = [], []
    for name in names(rows):
        mine = [row for row in rows if row["variant"] == name and row["equal"] == "tokens"]
        seed = mine[0]["seed"]
        found = {r["lr_factor"]: r.get("val_loss") for r in mine if r["seed"] == seed}
        row = {"variant": name}
        for f in factors:
            row[f"x {f:g}"] = f"{found[f]:.4f}" if found.get(f) else "failed"
        table.append(row)
        best = min((f for f in factors if found.get(f)), key=found.get, default=None)
        if best in (factors[0], factors[-1]):
            edges.append(f"{name} (x {best:g})")
    note = f"At the edge of the rates tried: {', '.join(edges)}." if edges else ""
    return [*markdown(table), *(["", note] if note else [])]


# ---- pictures
def draw(rows: Rows, folder: Path) -> None:
    """loss_cache.png and loss_seconds.png; nothing without matplotlib or without runs."""
    done = [row for row in rows if "val_loss" in row]
    if not done:
        return
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        print("warning: no pictures: they need matplotlib", file=sys.stderr)
        return
    draw_cache(done, folder / "loss_cache.png")
    draw_seconds(done, folder / "loss_seconds.png")


def style(i: int) -> dict[str, Any]:
    return {"marker": MARKERS[i % len(MARKERS)], "color": COLORS[i % len(COLORS)]}


def pareto(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points than which none is smaller in the one without being larger in the other."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def draw_cache(done: Rows, path: Path) -> None:
    """The final loss over cache bytes per token, with the Pareto front of equal tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="cache bytes per token at the trained context",
        ylabel="validation loss (nats per token)",
    )
    axes.set_xscale("log", base=2)
    points, sizes = [], set()
    for i, name in enumerate(names(done)):
        for equal, fill in (("tokens", "full"), ("parameters", "none")):
            mine = repeated(done, name, equal)
            if not mine:
                continue
            loss, spread = mean_and_spread(mine)
            x = mine[0]["cache_bytes"]
            label = name if equal == "tokens" else None
            look = style(i) | {"fillstyle": fill, "ms": 9 if fill == "none" else 7}
            axes.errorbar(x, loss, spread, ls="", capsize=4, lw=1, label=label, **look)
            sizes.add(round(x))
            if equal == "tokens":
                points.append((x, loss))
    axes.plot(*zip(*pareto(points), strict=True), "--", color="gray", lw=1, label="Pareto front")
    if any(row["equal"] == "parameters" for row in done):
        axes.plot([], [], "o", color="gray", fillstyle="none", ms=9, label="equal parameters")
    axes.set_xticks(sorted(sizes), [f"{x:,}" for x in sorted(sizes)], rotation=30)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=100)


def draw_seconds(done: Rows, path: Path) -> None:
    """The validation loss over seconds of training, of the median run in time of every variant."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="seconds of training, evaluations and start-up included",
        ylabel="validation loss (nats per token)",
    )
    lowest, highest = [], []
    for i, name in enumerate(names(done)):
        curves = [r["curve"] for r in repeated(done, name) if r["curve"]]
        if not curves:
            continue
        curve = sorted(curves, key=lambda points: points[-1][1])[len(curves) // 2]
        line = ("-", "--", "-.", ":")[i % 4]
        seconds, losses = [p[1] for p in curve], [p[2] for p in curve]
        axes.plot(seconds, losses, line, lw=1.2, ms=6, label=name, **style(i))
        lowest.append(min(losses))
        highest.append(losses[min(1, len(losses) - 1)])
    if lowest:
        room = max(max(highest) - min(lowest), 0.01)
        axes.set_ylim(min(lowest) - 0.05 * room, max(highest) + 0.1 * room)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=100)

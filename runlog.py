"""What a run leaves behind besides its weights: log.jsonl, loss.png and, if asked for, wandb."""

import json
import os
import sys
from pathlib import Path
from typing import Any


class RunLog:
    """
    One JSON object a line in out_dir/log.jsonl, appended and flushed; the same to wandb. For rank 0.

    resume_at: drop what was logged for this iteration and later, which a resumed run does again.
    """

    def __init__(self, out_dir: str, resume_at: int = 0) -> None:
        self.path = Path(out_dir) / "log.jsonl"
        self.entries = [e for e in read_log(self.path) if e["iter"] < resume_at] if resume_at else []
        aside = self.path.with_name(".log.jsonl.tmp")
        aside.write_text("".join(json.dumps(e) + "\n" for e in self.entries), encoding="utf-8")
        os.replace(aside, self.path)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  open as long as the run lasts
        self.wandb = None

    def start_wandb(self, project: str, name: str | None, config: dict[str, Any], run_id: str | None) -> str | None:
        """Open a wandb run, or go on with run_id; returns its id. Without wandb, training goes on and says so."""
        try:
            import wandb

            self.wandb = wandb.init(project=project, name=name, config=config, id=run_id, resume="allow", dir=self.path.parent)
            return self.wandb.id
        except Exception as error:  # noqa: BLE001  whatever wandb does must not cost the run
            self._lost_wandb(error)
            return run_id

    def write(self, **entry: Any) -> None:
        self.entries.append(entry)
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        if self.wandb is not None:
            try:
                self.wandb.log({k: v for k, v in entry.items() if k != "iter"}, step=entry["iter"])
            except Exception as error:  # noqa: BLE001
                self._lost_wandb(error)

    def plot(self) -> None:
        """Draw out_dir/loss.png, if matplotlib is installed and there is something to draw."""
        evals = [e for e in self.entries if "val_loss" in e]
        steps = [e for e in self.entries if "loss" in e]
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        if not evals:
            return
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="iteration", ylabel="loss (nats per token)")
        thin = max(len(steps) // 2000, 1)
        axes.plot([e["iter"] for e in steps[::thin]], [e["loss"] for e in steps[::thin]], lw=0.5, alpha=0.5, label="batch")
        axes.plot([e["iter"] for e in evals], [e["train_loss"] for e in evals], marker=".", label="train")
        axes.plot([e["iter"] for e in evals], [e["val_loss"] for e in evals], marker=".", label="val")
        axes.legend()
        figure.savefig(self.path.parent / "loss.png", dpi=110)

    def close(self) -> None:
        self.file.close()
        if self.wandb is not None:
            try:
                self.wandb.finish(quiet=True)
            except Exception as error:  # noqa: BLE001
                self._lost_wandb(error)

    def _lost_wandb(self, error: Exception) -> None:
        self.wandb = None
        print(f"warning: wandb is off from here on ({type(error).__name__}: {error})", file=sys.stderr)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log.jsonl, [] if there is none; a last line cut off by a kill is left out."""
    entries = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
    return entries

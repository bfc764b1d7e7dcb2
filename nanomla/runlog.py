"""
What a run writes besides its weights: log.jsonl, loss.png and, if asked to, a wandb run.

    python -m nanomla.runlog out-mla/log.jsonl     draw loss.png beside it at every line on stdin
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanomla.errors import UserError, say
from nanomla.files import replacing, write_text

ROOT = Path(__file__).resolve().parents[1]


class RunLog:
    """
    The log of a run: one JSON object a line in out_dir/log.jsonl, and the same numbers in wandb.

    Only rank 0 has a log. resume_at: the iteration that a resumed run starts at; lines of earlier
    iterations are kept, the others are dropped, as their iterations are done again.
    Raises UserError if the file cannot be written at the start. A later failure gives a warning and
    does not stop training; lines that did not fit on the disk are written when it has room again.
    """

    def __init__(self, out_dir: str, resume_at: int = 0, settings: Sequence[str] = ()) -> None:
        self.path = Path(out_dir) / "log.jsonl"
        entries = []
        if resume_at:
            entries = [e for e in read_log(self.path) if e["iter"] < resume_at]
        try:
            write_text(self.path, "".join(json.dumps(e) + "\n" for e in entries))
            # Unbuffered, and open as long as the run lasts.
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror})") from None
        self.unwritten = b""
        self.warned = False
        self.settings = list(settings)  # they go into the first entry
        self.wandb: Any = None  # the run in wandb
        self.plotter: subprocess.Popen | None = None

    def start_wandb(
        self, project: str, name: str | None, config: dict[str, Any], run_id: str | None
    ) -> str | None:
        """
        Open a wandb run, or continue `run_id`; returns its id, or `run_id` if wandb fails.

        name: what wandb shows; None: the name of the run's folder.
        """
        try:
            import wandb

            folder = self.path.parent
            self.wandb = wandb.init(
                project=project,
                name=name or folder.absolute().name,
                config=config,
                id=run_id,
                resume="allow",
                dir=folder,
            )
            return self.wandb.id
        except Exception as error:  # noqa: BLE001  a failure of wandb must not stop the run
            self._lost_wandb(error)
            return run_id

    def write(self, **entry: Any) -> None:
        """Append an entry, which must have the key `iter`, to the log and to wandb."""
        numbers = {k: v for k, v in entry.items() if k != "iter"}
        if self.settings:
            entry["settings"] = self.settings
            self.settings = []
        self.unwritten += json.dumps(entry).encode() + b"\n"
        self._flush()
        if self.wandb is not None:
            try:
                self.wandb.log(numbers, step=entry["iter"])
            except Exception as error:  # noqa: BLE001  as above
                self._lost_wandb(error)

    def _flush(self) -> None:
        """Write what is unwritten. What a full disk does not take, perhaps half a line, stays."""
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            if not self.warned:
                what = f"{self.path} cannot be written ({error.strerror})"
                say(f"warning: {what}; training goes on", sys.stderr)
            self.warned = True

    def plot(self) -> None:
        """
        Draw out_dir/loss.png in a process of low priority, if matplotlib is installed.

        Loading matplotlib and drawing take nearly a second each, too long for the training process.
        """
        try:
            if self.plotter is None:
                if importlib.util.find_spec("matplotlib") is None:
                    return
                # In the root folder `nanomla` can be imported without being installed. In a session
                # of its own the process does not receive Ctrl-C, and can draw the last picture.
                self.plotter = subprocess.Popen(
                    [sys.executable, "-m", "nanomla.runlog", str(self.path.resolve())],
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    start_new_session=True,
                )
            if self.plotter.poll() is None:
                self.plotter.stdin.write(b"\n")
                self.plotter.stdin.flush()
        except OSError:
            return  # the plotter ended after a warning of its own

    def close(self, at_once: bool = False) -> None:
        """End the log; at_once: without waiting for wandb's transfers or the last picture."""
        self._flush()
        self.file.close()
        if self.plotter is not None:
            try:
                self.plotter.communicate(timeout=0 if at_once else 10)
            except (OSError, ValueError, subprocess.TimeoutExpired):
                self.plotter.kill()
        if self.wandb is not None and not at_once:
            try:
                self.wandb.finish()
            except Exception as error:  # noqa: BLE001  as above
                self._lost_wandb(error)

    def _lost_wandb(self, error: Exception) -> None:
        self.wandb = None
        reason = f"{type(error).__name__}: {error}"
        say(f"warning: wandb is off from here on ({reason})", sys.stderr)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def evaluation_text(measures: dict[str, float]) -> str:
    """One line for an evaluation: train_loss, val_loss, perplexity and perhaps bits_per_byte."""
    text = "train loss {train_loss:.4f}, val loss {val_loss:.4f}, perplexity {perplexity:.2f}"
    if "bits_per_byte" in measures:
        text += ", {bits_per_byte:.3f} bits per byte"
    return text.format(**measures)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log.jsonl, [] if there is none; lines damaged by a kill are left out."""
    entries = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict) and isinstance(entry.get("iter"), int):
                entries.append(entry)
    return entries


def draw(path: Path) -> None:
    """Draw loss.png beside a log.jsonl; nothing if the log has no evaluation yet."""
    from matplotlib.figure import Figure

    entries = read_log(path)
    evals = [e for e in entries if "val_loss" in e]
    steps = [e for e in entries if "loss" in e]
    if not evals:
        return
    steps = steps[:: max(len(steps) // 2000, 1)]  # more points than pixels only cost time
    labels = {"xlabel": "iteration", "ylabel": "loss (nats per token)"}
    figure = Figure(figsize=(7, 4))
    # Axes of a fixed size, because matplotlib's automatic layout takes as long as the drawing.
    axes = figure.add_axes((0.09, 0.12, 0.88, 0.84), **labels)
    axes.plot(*_curve(steps, "loss"), lw=0.5, alpha=0.5, label="batch")
    axes.plot(*_curve(evals, "train_loss"), marker=".", label="train")
    axes.plot(*_curve(evals, "val_loss"), marker=".", label="val")
    axes.legend(loc="upper right")
    with replacing(path.with_name("loss.png")) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png")


def _curve(entries: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    return [e["iter"] for e in entries], [e[key] for e in entries]


def draw_on_request(path: Path) -> None:
    """Draw once for all lines that have arrived on stdin, again and again until stdin ends."""
    if hasattr(os, "nice"):
        os.nice(10)
    try:
        # Loaded before the first request, while the run is busy with its first iterations.
        import matplotlib.figure  # noqa: F401

        while os.read(0, 4096):
            draw(path)
    except Exception as error:  # noqa: BLE001  a missing picture needs no traceback
        what = f"no {path.with_name('loss.png')} from here on ({type(error).__name__}: {error})"
        say(f"warning: {what}", sys.stderr)


if __name__ == "__main__":
    draw_on_request(Path(sys.argv[1]))

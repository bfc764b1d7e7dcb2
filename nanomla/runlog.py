"""What a run writes besides its weights: log.jsonl, loss.png and, if asked to, a wandb run."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nanomla.checks import Natural, fit
from nanomla.errors import say
from nanomla.files import json_text, replacing, write_text

NUMBERS = ("loss", "train_loss", "val_loss", "ms", "seconds")  # what is drawn and compared


class RunLog:
    """
    The log of a run: one JSON object a line in out_dir/log.jsonl, and the same numbers in wandb.

    Only rank 0 has a log. resume_at: the iteration that a resumed run starts at; lines of earlier
    iterations are kept, the others are dropped, as their iterations are done again.
    Raises OSError if the file cannot be written at the start. A later failure gives a warning and
    does not stop training; lines that did not fit on the disk are written when it has room again.
    """

    def __init__(self, out_dir: str, resume_at: int = 0, settings: Sequence[str] = ()) -> None:
        self.path = Path(out_dir) / "log.jsonl"
        entries = []
        if resume_at:
            entries = [e for e in read_log(self.path) if e["iter"] < resume_at]
        write_text(self.path, "".join(json_text(e) + "\n" for e in entries))
        # Open as long as the run lasts; what a full disk does not take stays in the buffer.
        self.file = open(self.path, "ab", buffering=2**20)  # noqa: SIM115
        self.warned = False
        self.settings = list(settings)  # they go into the first entry
        self.wandb: Any = None  # the run in wandb
        self.drawn_at = time.monotonic()
        self.pause = 60.0  # seconds until loss.png is drawn again

    def start_wandb(
        self, project: str, name: str | None, config: dict[str, Any], run_id: str | None
    ) -> str | None:
        """
        Open a wandb run, or continue `run_id`; returns its id, or `run_id` if wandb fails.

        name: what wandb shows; None: the name of the run's folder.
        """
        folder = self.path.parent
        with self._outliving_wandb():
            import wandb

            self.wandb = wandb.init(
                project=project,
                name=name or folder.absolute().name,
                config=config,
                id=run_id,
                resume="allow",
                dir=folder,
            )
            return self.wandb.id
        return run_id

    def write(self, **entry: Any) -> None:
        """Append an entry, which must have the key `iter`, to the log and to wandb."""
        numbers = {k: v for k, v in entry.items() if k != "iter"}
        if self.settings:
            entry["settings"] = self.settings
            self.settings = []
        try:
            self.file.write(json_text(entry).encode() + b"\n")
            self.file.flush()
        except OSError as error:
            if not self.warned:
                what = f"{self.path} cannot be written ({error.strerror})"
                say(f"warning: {what}; training goes on", sys.stderr)
            self.warned = True
        if self.wandb is not None:
            with self._outliving_wandb():
                self.wandb.log(numbers, step=entry["iter"])

    def plot(self) -> None:
        """Draw loss.png once a minute, or less often, so that it takes under 1% of the time."""
        if time.monotonic() - self.drawn_at > self.pause:
            self._draw()

    def _draw(self) -> None:
        began = time.monotonic()
        try:
            draw(self.path)
        except ModuleNotFoundError:
            pass  # matplotlib is not installed
        except Exception as error:  # noqa: BLE001  a missing picture must not stop the run
            what = f"loss.png was not drawn ({type(error).__name__}: {error})"
            say(f"warning: {what}", sys.stderr)
        self.drawn_at = time.monotonic()
        self.pause = max(60.0, 100 * (self.drawn_at - began))

    def close(self, at_once: bool = False) -> None:
        """End the log; at_once: without a last picture or waiting for wandb's transfers."""
        with contextlib.suppress(OSError):  # of which write has warned
            self.file.close()
        if at_once:
            return
        self._draw()
        if self.wandb is not None:
            with self._outliving_wandb():
                self.wandb.finish()

    @contextlib.contextmanager
    def _outliving_wandb(self) -> Iterator[None]:
        """A context in which a failure of wandb turns it off and is a warning."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  wandb must not stop the run
            self.wandb = None
            reason = f"{type(error).__name__}: {error}"
            say(f"warning: wandb is off from here on ({reason})", sys.stderr)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def evaluation_text(measures: dict[str, float]) -> str:
    """
    One line for an evaluation: train_loss, val_loss, perplexity, and what there is of
    bits_per_byte, predict_loss and experts' shares.
    """
    text = "train loss {train_loss:.4f}, val loss {val_loss:.4f}, perplexity {perplexity:.2f}"
    if "bits_per_byte" in measures:
        text += ", {bits_per_byte:.3f} bits per byte"
    if "predict_loss" in measures:
        text += ", token after next {predict_loss:.4f}"
    if "expert_share_min" in measures:
        text += ", experts' loads {expert_share_min:.1%} to {expert_share_max:.1%}"
    return text.format(**measures)


def read_log(path: Path) -> list[dict[str, Any]]:
    """
    The entries of a log.jsonl, [] if there is none: objects with `iter`, in which each of NUMBERS
    is a number or missing, as a loss is that was none and was written as null. Other lines, damaged
    by a kill or of another program, are left out.
    """
    entries = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                entry = fit(json.loads(line), dict[str, Any])
                entry = {name: value for name, value in entry.items() if value is not None}
                fit(entry.get("iter"), Natural)
                fit([entry[name] for name in NUMBERS if name in entry], list[float])
            except (ValueError, RecursionError):
                continue
            entries.append(entry)
    return entries


def draw(path: Path) -> None:
    """Draw loss.png beside a log.jsonl; nothing if the log has no evaluation yet."""
    from matplotlib.figure import Figure

    entries = read_log(path)
    steps = [e for e in entries if "loss" in e]
    if not any("val_loss" in e for e in entries):
        return
    steps = steps[:: max(len(steps) // 2000, 1)]  # more points than pixels only cost time
    labels = {"xlabel": "iteration", "ylabel": "loss (nats per token)"}
    figure = Figure(figsize=(7, 4))
    # Axes of a fixed size, because matplotlib's automatic layout takes as long as the drawing.
    axes = figure.add_axes((0.09, 0.12, 0.88, 0.84), **labels)
    axes.plot(*_curve(steps, "loss"), lw=0.5, alpha=0.5, label="batch")
    axes.plot(*_curve(entries, "train_loss"), marker=".", label="train")
    axes.plot(*_curve(entries, "val_loss"), marker=".", label="val")
    axes.legend(loc="upper right")
    with replacing(path.with_name("loss.png")) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png")


def _curve(entries: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """The iterations of the entries that have this number, and the numbers."""
    having = [e for e in entries if key in e]
    return [e["iter"] for e in having], [e[key] for e in having]

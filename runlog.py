"""
What a run leaves behind besides its weights: log.jsonl, loss.png and, if asked for, wandb.

    python runlog.py out-mla/log.jsonl     draw loss.png beside it, once for every line on stdin
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from configurator import UserError


class RunLog:
    """
    One JSON object a line in out_dir/log.jsonl, appended and flushed; the same to wandb. For rank 0.

    resume_at: drop what was logged for this iteration and later, which a resumed run does again.
    Raises UserError if there is no room to start. Once the run is under way, nothing here stops it: what fails is
    said once, and lines that the disk refused are written as soon as it takes them.
    """

    def __init__(self, out_dir: str, resume_at: int = 0) -> None:
        self.path = Path(out_dir) / "log.jsonl"
        entries = [e for e in read_log(self.path) if e["iter"] < resume_at] if resume_at else []
        aside = self.path.with_name(".log.jsonl.tmp")
        try:
            aside.write_text("".join(json.dumps(e) + "\n" for e in entries), encoding="utf-8")
            os.replace(aside, self.path)
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115  open as long as the run lasts
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror})") from None
        self.unwritten, self.warned = b"", False
        self.wandb: Any = None
        self.plotter: subprocess.Popen | None = None

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
        self.unwritten += json.dumps(entry).encode() + b"\n"
        self._flush()
        if self.wandb is not None:
            try:
                self.wandb.log({k: v for k, v in entry.items() if k != "iter"}, step=entry["iter"])
            except Exception as error:  # noqa: BLE001
                self._lost_wandb(error)

    def _flush(self) -> None:
        """Write what is unwritten; what does not fit, in the middle of a line perhaps, stays for the next time."""
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            if not self.warned:
                print(f"warning: {self.path} cannot be written ({error.strerror}); training goes on", file=sys.stderr)
            self.warned = True

    def plot(self) -> None:
        """
        Have out_dir/loss.png drawn, if matplotlib is installed. By a process of low priority: loading matplotlib and
        drawing take the better part of a second each, which a run of a minute would feel.
        """
        try:
            if self.plotter is None:
                if importlib.util.find_spec("matplotlib") is None:
                    return
                command = [sys.executable, __file__, str(self.path)]
                # A session of its own: Ctrl-C is for the run, and the last picture is drawn after it.
                self.plotter = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
            if self.plotter.poll() is None:
                self.plotter.stdin.write(b"\n")
                self.plotter.stdin.flush()
        except OSError:
            return  # it has said itself why there is no picture

    def close(self, at_once: bool = False) -> None:
        """End the run's log; at_once: without waiting for wandb's transfers or the last picture."""
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
            except Exception as error:  # noqa: BLE001
                self._lost_wandb(error)

    def _lost_wandb(self, error: Exception) -> None:
        self.wandb = None
        print(f"warning: wandb is off from here on ({type(error).__name__}: {error})", file=sys.stderr)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log.jsonl, [] if there is none; lines that a kill or a crash of the machine cut are left out."""
    entries = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("iter"), int):
                entries.append(entry)
    return entries


def draw(path: Path) -> None:
    """loss.png beside a log.jsonl; nothing if it holds no evaluation yet."""
    from matplotlib.figure import Figure

    entries = read_log(path)
    evals = [e for e in entries if "val_loss" in e]
    steps = [e for e in entries if "loss" in e]
    if not evals:
        return
    figure = Figure(figsize=(7, 4))
    # A fixed place: a run waits for its last picture, and searching for a good one takes as long as drawing.
    axes = figure.add_axes((0.09, 0.12, 0.88, 0.84), xlabel="iteration", ylabel="loss (nats per token)")
    thin = max(len(steps) // 2000, 1)
    axes.plot([e["iter"] for e in steps[::thin]], [e["loss"] for e in steps[::thin]], lw=0.5, alpha=0.5, label="batch")
    axes.plot([e["iter"] for e in evals], [e["train_loss"] for e in evals], marker=".", label="train")
    axes.plot([e["iter"] for e in evals], [e["val_loss"] for e in evals], marker=".", label="val")
    axes.legend(loc="upper right")
    aside = path.with_name(".loss.png.tmp")  # renamed when whole: a kill leaves no half picture
    figure.savefig(aside, dpi=110, format="png")
    os.replace(aside, path.with_name("loss.png"))


def draw_on_request(path: Path) -> None:
    """Draw for every line on stdin, once for those that came in meanwhile, until stdin ends."""
    if hasattr(os, "nice"):
        os.nice(10)
    try:
        import matplotlib.figure  # noqa: F401  while the run is busy with its first iterations

        while os.read(0, 4096):
            draw(path)
    except Exception as error:  # noqa: BLE001  a picture is not worth a traceback
        print(f"warning: no {path.with_name('loss.png')} from here on ({type(error).__name__}: {error})", file=sys.stderr)


if __name__ == "__main__":
    draw_on_request(Path(sys.argv[1]))

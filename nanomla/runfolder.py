"""
The folder of a run while it trains in it: one run at a time, the files of an earlier run moved
aside, and which checkpoints are on the disk.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

from nanomla import checkpoint
from nanomla.checkpoint import BEST, LATEST, Checkpoint
from nanomla.dataset import locked
from nanomla.distributed import World, print0, warn0
from nanomla.errors import UserError


class RunFolder:
    """
    The folder of a run and what has been saved in it.

    resumes: whether the run goes on from the checkpoint in it. Rank 0 alone writes; all ranks must
    call training() and save() together.
    """

    def __init__(self, out_dir: str, resumes: bool, world: World) -> None:
        self.path = Path(out_dir)
        self.resumes = resumes
        self.world = world
        self.best_val_loss = math.inf  # the lowest one of weights that are on the disk
        self.tried_at: int | None = None  # the iteration of the last attempt to save
        self.saved_at: int | None = None  # the iteration of the checkpoint that is on the disk
        self.wandb_run_id: str | None = None

    def goes_on_from(self, state: Checkpoint) -> None:
        """Take over what is known of a run's checkpoints from the one that was read."""
        self.best_val_loss = state.best_val_loss
        self.wandb_run_id = state.wandb_run_id
        if self.resumes:
            self.tried_at = state.iter_num
            self.saved_at = state.iter_num

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """
        A context in which this run alone trains in the folder. An error gets a note that names the
        last checkpoint.

        Raises OSError if the folder cannot be made, UserError if another run trains in it.
        """
        self.world.barrier()  # all ranks have read their checkpoint, which a new run may move
        with contextlib.ExitStack() as stack:
            if self.world.is_main:
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.path, "training in it"))
                for unfinished in self.path.glob(".*.pt.*.tmp"):
                    unfinished.unlink()  # of a run that was killed
                if not self.resumes:
                    move_earlier_run(self.path)
                elif math.isfinite(self.best_val_loss) and not (self.path / BEST).is_file():
                    # nanoGPT's ckpt.pt is the best
                    checkpoint.second_name(self.path / LATEST, self.path / BEST)
            try:
                yield
            except Exception as error:
                error.add_note(f"last checkpoint: {self.last_checkpoint()}")
                raise

    def last_checkpoint(self) -> str:
        """The file of the latest checkpoint that is on the disk, or "none yet"."""
        try:
            return str(checkpoint.find(self.path))
        except UserError:
            return "none yet"

    def save(self, it: int, state: Checkpoint | None, val_loss: float = math.inf) -> None:
        """
        Write ckpt.pt and, if this validation loss is the lowest so far, best.pt. If that fails,
        warn and go on; the lowest loss is that of weights which are on the disk.

        state: what to write, without the fields that this class keeps; None on all ranks but 0.
        """
        self.tried_at = it
        is_best = val_loss < self.best_val_loss
        best_val_loss = min(val_loss, self.best_val_loss)
        written = False
        if state is not None:
            state.iter_num = it
            state.best_val_loss = best_val_loss
            state.wandb_run_id = self.wandb_run_id
            try:
                checkpoint.save(self.path, state, is_best)
                written = True
            except UserError as error:
                warn0(f"{error}; training goes on")
        if self.world.sum(written) == [1.0]:
            self.saved_at = it
            self.best_val_loss = best_val_loss

    def require_checkpoint(self, it: int) -> str:
        """
        What is on the disk at the end of a run, in words: the checkpoint of this iteration, or an
        earlier one. Raises UserError if there is none.
        """
        if self.world.is_main and self.last_checkpoint() == "none yet":
            raise UserError(f"iteration {it} is done, but there is no checkpoint in {self.path}")
        if self.saved_at != it:
            return f"but the checkpoint in {self.path} is of iteration {self.saved_at}"
        return f"checkpoints in {self.path}"


def move_earlier_run(folder: Path) -> None:
    """Move the files of an earlier run in this folder to a folder old-N in it."""
    names = [LATEST, BEST, "log.jsonl", "loss.png", "wandb"]
    names += checkpoint.CONVERSION
    earlier = [path for path in folder.iterdir() if path.name in names]
    if not earlier:
        return
    number = 1
    old = folder / "old-1"
    while any((old / path.name).exists() for path in earlier):  # else go on where one was killed
        number += 1
        old = folder / f"old-{number}"
    old.mkdir(exist_ok=True)
    for path in earlier:
        path.rename(old / path.name)
    print0(f"an earlier run was here: it is now in {old}")

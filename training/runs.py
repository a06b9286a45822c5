"""A training run that can be stopped at any step and resumed: what the training scripts share."""

import argparse
import contextlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path

from training import flags, ranks
from training.logs import RunLog, read_json
from training.loop import Trainer, device_of
from training.signals import Signals
from training.states import load_state, read_state, save_state
from twa.files.checkpoints import CheckpointError
from utils import UserError, make_directory

# Steps after which the ranks of accelerators look whether one of them is to stop.
LOOK = 5


class Run:
    """Epoch after epoch of a `Trainer`, with a log and a state to go on from.

    It goes on from a saved state under `--resume`, and where `torchrun` restarts the ranks. The
    state is saved before the first step, after each epoch and, when a signal comes to any rank,
    after the step in hand. TWA's sum tells the ranks of the signal; for other optimizers they ask
    each other, in an all-reduce of one number.

    Args:
        args: the script's arguments; those of `flags.settings` must agree when a run is resumed
            (not with `--evaluate`).
        state: the file to save the state in.
        log_dir: where log and metrics go.
        flag: what names the directory of `state` on the command line.
        prefix: of the names of the files in `log_dir`.
        first_epoch: epochs that count as done if there is no state to go on from.
        save_every: epochs between two saved states.
        parts: what has a `state_dict` and belongs to the run besides what the trainer has.

    Attributes:
        done: epochs that are done.
        resumed: whether the run goes on in the directory of its own state.
        log: the run's log, from `start` on.

    Raises:
        UserError, CheckpointError: a state that cannot be gone on from; see `load_state`.
    """

    log: RunLog

    def __init__(
        self,
        args: argparse.Namespace,
        trainer: Trainer,
        *,
        state: Path,
        log_dir: Path,
        flag: str,
        prefix: str = "",
        first_epoch: int = 0,
        save_every: int = 1,
        **parts,
    ):
        self._args, self._trainer, self._save_every = args, trainer, save_every
        self._log_dir, self._prefix, self._first_epoch = log_dir, prefix, first_epoch
        self._state = trainer.state = state
        # What the data are counts, not where they lie.
        self._settings = flags.settings(args) | {"data_dir": trainer.train.split.spec.content}
        self._flag = flag
        self._parts = parts | {
            "model": trainer.model,
            "optimizer": trainer.optimizer,
            "scheduler": trainer.scheduler,
            "progress": trainer.progress,
        }
        self.done, self.resumed = first_epoch, False
        source = Path(args.resume or state)
        wanted = args.resume is not None or ranks.restarts() > 0
        evaluates = vars(args).get("evaluate")
        if evaluates and args.resume == "" and not source.exists():
            raise UserError(f"--resume: there is no {source} to evaluate; train first")
        if wanted and (args.resume or source.exists()):
            settings = {} if evaluates else self._settings
            self.done = load_state(source, settings, flag, **self._parts)
            self.resumed = source.resolve().parent == state.resolve().parent

    def keep_other_results(self) -> None:
        """Raises a `UserError` if the run would replace one of other settings."""
        if self._state.exists() and not self.resumed:
            with contextlib.suppress(CheckpointError):  # which nobody can go on from
                read_state(self._state, self._settings, self._flag)

    def keep_other_log(self) -> None:
        """Raises a `UserError` if the run would replace the log of one with other checkpoints."""
        path = self._log_dir / f"{self._prefix}run.json"
        other = read_json(path).get("arguments", {})
        if not {"save_dir", "log_dir"} <= other.keys() or self._args.resume or self._args.overwrite:
            return  # a named state is gone on from, and so is the log
        # From the folder of the log on, which may be called another way, or have been moved.
        ours, its = (
            os.path.relpath(a["save_dir"], a["log_dir"]) for a in (vars(self._args), other)
        )
        if ours != its:
            raise UserError(
                f"{path}: is of the run with the checkpoints in {other['save_dir']}; give another "
                "--log-dir, or --overwrite to replace it"
            )

    @property
    def is_before_first_step(self) -> bool:
        return self.done == self._first_epoch and self._trainer.progress.iteration == 0

    def save(self) -> None:
        """Saves the state; called on every rank."""
        save_state(self._state, self.done, self._settings, **self._parts)

    def start(self, *lines: str) -> None:
        """Opens the log with `lines`, and saves the state if no step is done yet."""
        self.log = RunLog(self._args, self._log_dir, self._prefix, self.done)
        self._trainer.line = self.log.line
        for line in lines:
            self.log.line(line)
        if self.is_before_first_step:
            self.save()

    def train(
        self,
        after_step: Callable[[int, int], None] | None = None,
        after_epoch: Callable[[int, dict], None] | None = None,
    ) -> None:
        """Trains the epochs that are left.

        Args:
            after_step: called after each optimizer step with the epoch, from 1 on, and the
                iterations done in it.
            after_epoch: called after each epoch with its number and its metrics, which it may add
                to, before these are logged and the state is saved.
        """
        optimizer, steps = self._trainer.optimizer, itertools.count(1)
        # To look makes an accelerator wait; a rank by itself looks at nothing.
        every = 1 if ranks.world() == 1 or device_of(self._trainer.model).type == "cpu" else LOOK

        def tell() -> None:
            optimizer.stop = True

        with Signals(held=True, told=tell) as signals:

            def step_done(iteration: int) -> None:
                if after_step:
                    after_step(self.done + 1, iteration)
                if next(steps) % every == 0 and getattr(optimizer, "stopping", True):
                    signals.check(self.save)

            for epoch in range(self.done + 1, self._trainer.epochs + 1):
                metrics = self._trainer.epoch(epoch, step_done)
                if after_epoch:
                    after_epoch(epoch, metrics)
                self.log.epoch(metrics, getattr(optimizer, "averaging_weights", None))
                self.done = epoch
                if epoch % self._save_every == 0 or epoch == self._trainer.epochs:
                    self.save()
                signals.check(self.save)


def clear(save_dir: Path, overwrite: bool) -> None:
    """Makes `save_dir`, empty of checkpoints; those of an earlier run go only if `overwrite`.

    The first rank does so; the others leave it to that.

    Raises:
        UserError: the directory cannot be made, or holds checkpoints that must not go.
    """
    if ranks.rank() > 0:
        return
    make_directory(save_dir)
    earlier = [path for path in save_dir.glob("*.pt") if path.stem.isdecimal()]
    if earlier and not overwrite:
        raise UserError(
            f"{save_dir}: holds the checkpoints of an earlier run; "
            "--resume goes on with it, --overwrite replaces it"
        )
    # The state first: a kill here must not leave a state whose checkpoints are gone.
    for path in (save_dir / "state.pt", *earlier):
        path.unlink(missing_ok=True)

"""Trains a language model at a constant rate and saves the checkpoints that TWA averages later.

    python train.py --dir ../results/lm --steps 4000 --save-every 50

Saves `<dir>/checkpoints/N.pt` after N times --save-every steps (0: the initialisation), and
`state.pt`, to resume, beside them; the log goes to `<dir>`. The decay that such a run usually ends
with begins from its saved state, in a folder of its own:

    python train.py --dir ../results/lm_decay --steps 400 --decay 1-sqrt --decay-steps 400 \\
        --warmup 0 --initial ../results/lm/checkpoints/state.pt
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataclasses import dataclass

import models
import utils
from training import flags, sgd, tasks, text
from training.optimizers import SCHEDULES
from training.run import Run, run_script
from training.settings import REQUIRED, derived, flag, free
from twa.checkpoints import load_into
from twa.formats import load
from utils import UserError


@dataclass(kw_only=True)
class Settings(flags.Model, text.TextSettings, flags.Batch, flags.Overwrite, flags.Run):
    """trains a language model at a constant rate, or at a falling one"""

    log_dir: str = free(REQUIRED, "output folder", "--dir")
    arch: str = flag("gpt", choices=models.LANGUAGE_MODELS)
    data_dir: str | None = free(
        None, "file or folder of text (default: Python's standard library)", metavar="PATH"
    )
    batch_size: int = 16
    total_steps: int = flag(4000, "total number of steps", "--steps", low=0)
    save_every: int = flag(50, "steps between checkpoints", low=1)
    epoch_steps: int | None = flag(
        None, "steps between tests and resumable states (default: 400)", "--test-every", low=1
    )
    lr: float = flag(2e-3, "learning rate of AdamW", **flags.SCALE)
    weight_decay: float = flag(0.1, "weight decay", "--weight-decay", "--wd", **flags.SCALE)
    clip_grad: float = flag(1.0, "maximum gradient norm", low=0, metavar="NORM")
    warmup: int = flag(100, "steps over which the rate rises linearly", low=0)
    decay: str = flag("linear", "how the rate falls to 0", choices=("linear", "1-sqrt"))
    decay_steps: int = flag(0, "last steps, over which the rate falls", low=0)
    initial: str | None = free(
        None,
        "begin with a checkpoint's weights, or a saved state's weights and moments of AdamW",
        metavar="FILE",
    )
    evaluate: bool = free(
        False, "only test the model, with --resume the saved one", "--evaluate", "-e"
    )
    # What the engine calls otherwise: an epoch is what lies between two tests.
    epochs: int = derived(free=False)
    saves_per_epoch: int = derived(free=False)
    warmup_epochs: float = derived(free=False)
    datasets: str = derived(flags.TEXT, free=False)
    optimizer: str = derived("adamw", free=False)
    momentum: float = derived(0.0, free=False)
    label_smoothing: float = derived(0.0, free=False)
    save_dir: str | None = derived()
    split: bool = derived(True)
    val_ratio: float | None = derived()
    images: int | None = derived()

    def check(self):
        steps, every = self.total_steps, self.epoch_steps or min(400, self.total_steps) or 1
        if self.warmup + self.decay_steps > steps:
            raise UserError(
                f"--warmup {self.warmup} and --decay-steps {self.decay_steps}: more than the "
                f"{steps} of --steps"
            )
        if steps % every or every % self.save_every:
            raise UserError(
                f"--steps {steps}, --test-every {every}, --save-every {self.save_every}: each has "
                "to be a multiple of the next"
            )
        self.epoch_steps, self.epochs = every, steps // every
        self.saves_per_epoch = every // self.save_every
        self.warmup_epochs = self.warmup / every
        self.save_dir = str(Path(self.log_dir) / "checkpoints")


def main():
    args = Settings.parse()
    with Run(args, args.save_dir, "--dir", log_dir=args.log_dir) as run:
        train_language_model(args, run)


def train_language_model(args, run):
    utils.set_seed(args.randomseed)
    task = tasks.of(args)
    model = task.build()
    state = None
    if args.initial:
        load_into(model, args.initial)
        content = load(args.initial)
        settings = content.get("settings")
        # Other checkpoints may hold an optimizer too, which may be another, as TWA's states do.
        if isinstance(settings, dict) and settings.get("optimizer") == args.optimizer:
            state = content["optimizer"]
    begins = 1 - args.decay_steps / max(1, args.total_steps - args.warmup)

    def factor(x: float) -> float:
        return 1.0 if x <= begins else SCHEDULES[args.decay]((x - begins) / (1 - begins))

    sgd.train(run, task, model, factor, state=state)


if __name__ == "__main__":
    run_script(main)

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
from training import entry, flags, sgd, tasks, text
from training.locks import lock
from training.optimizers import SCHEDULES
from training.settings import derived, flag
from twa.files.checkpoints import load_into
from twa.files.formats import load
from utils import UserError


@dataclass(kw_only=True)
class Settings(flags.Model, text.TextSettings, flags.Batch, sgd.Overwrite, flags.Run):
    """trains a language model at a constant rate, or at a falling one"""

    log_dir: str = flag("--dir", may_change=True, help="output folder")
    arch: str = flag(default="gpt", choices=models.LANGUAGE_MODELS)
    data_dir: str | None = flag(
        default=None,
        metavar="PATH",
        may_change=True,
        help="a file or a folder of text (default: the source of Python's standard library)",
    )
    batch_size: int = 16
    total_steps: int = flag("--steps", default=4000, low=0, help="total number of steps")
    save_every: int = flag(default=50, low=1, help="steps between checkpoints")
    epoch_steps: int | None = flag(
        "--test-every",
        default=None,
        low=1,
        help="steps between tests, and between resumable states (default: 400)",
    )
    lr: float = flag(default=2e-3, **flags.SCALE, help="learning rate of AdamW")
    weight_decay: float = flag(
        "--weight-decay", "--wd", default=0.1, **flags.SCALE, help="weight decay"
    )
    clip_grad: float = flag(default=1.0, low=0, metavar="NORM", help="maximum gradient norm")
    warmup: int = flag(default=100, low=0, help="steps over which the rate rises linearly")
    decay: str = flag(default="linear", choices=("linear", "1-sqrt"), help="how the rate falls")
    decay_steps: int = flag(default=0, low=0, help="last steps, over which the rate falls to 0")
    initial: str | None = flag(
        default=None,
        metavar="FILE",
        may_change=True,  # what the run began with is in its state
        help="begin with a checkpoint's weights, or a saved state's weights and moments of AdamW",
    )
    evaluate: bool = flag(
        "--evaluate",
        "-e",
        default=False,
        may_change=True,
        help="only test the model, with --resume the saved one",
    )
    # What the engine calls otherwise: an epoch is what lies between two tests.
    epochs: int = derived(may_change=False)
    saves_per_epoch: int = derived(may_change=False)
    warmup_epochs: float = derived(may_change=False)
    save_dir: str | None = derived()
    datasets: str = derived(flags.TEXT, may_change=False)
    optimizer: str = derived("adamw", may_change=False)
    momentum: float = derived(0.0, may_change=False)
    label_smoothing: float = derived(0.0, may_change=False)
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
    with lock(args.save_dir, writes=not args.evaluate):
        train_language_model(args)


def train_language_model(args):
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

    sgd.run(args, task, model, factor, state=state, flag="--dir")


if __name__ == "__main__":
    entry.run(main)

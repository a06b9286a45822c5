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

import models
import utils
from training import flags, sgd, text
from training.flags import number
from training.loop import set_up
from training.optimizers import SCHEDULES
from training.run import Run, run_script
from twa.files.checkpoints import load_into
from twa.files.formats import load


def parse_arguments():
    parser = flags.Parser("trains a language model at a constant rate, or on a falling one")
    add = parser.add_argument
    add("--dir", dest="log_dir", required=True, help="where everything is written")
    flags.add_model_arguments(parser, "--arch", "-a", choices=models.LANGUAGE_MODELS, default="gpt")
    data_help = "a file or a folder of text; left out, the source of Python's standard library"
    add("--data-dir", metavar="PATH", help=data_help)
    text.add_arguments(parser)
    flags.add_batch_arguments(parser, size=16)
    add("--steps", dest="total_steps", type=number(int, 0), default=4000, help="steps in all")
    add("--save-every", type=number(int, 1), default=50, help="steps between checkpoints")
    test_help = "steps between tests, and between states to resume from"
    add("--test-every", dest="epoch_steps", type=number(int, 1), help=f"{test_help}; left out, 400")
    add("--lr", type=flags.scale, default=2e-3, help="learning rate of AdamW")
    add("--weight-decay", "--wd", type=flags.scale, default=0.1, help="weight decay")
    add("--clip-grad", type=number(float, 0), default=1.0, metavar="NORM", help=flags.CLIP_HELP)
    add("--warmup", type=number(int, 0), default=100, help="steps of a linear rise of the rate")
    add("--decay", default="linear", choices=("linear", "1-sqrt"), help="how the rate falls to 0")
    add("--decay-steps", type=number(int, 0), default=0, help="over so many steps, the last ones")
    initial_help = "begin with the weights of a checkpoint, or with those of a saved state and "
    add("--initial", metavar="FILE", help=f"{initial_help} its moments of AdamW")
    evaluate_help = "test the model, with --resume the saved one, and end"
    add("--evaluate", "-e", action="store_true", help=evaluate_help)
    add("--overwrite", action="store_true", help=flags.OVERWRITE_HELP)
    flags.add_run_arguments(parser)
    parser.set_defaults(datasets=text.NAME, split=True, val_ratio=None, images=None)
    parser.set_defaults(optimizer="adamw", momentum=0.0, label_smoothing=0.0)
    args = parser.parse_args()
    args.save_dir = str(Path(args.log_dir) / "checkpoints")
    return check_arguments(args, parser)


def check_arguments(args, parser):
    """`args` with what the engine knows by other names: an epoch is what lies between two tests."""
    steps, every = args.total_steps, args.epoch_steps or min(400, args.total_steps) or 1
    if args.warmup + args.decay_steps > steps:
        parser.error(
            f"--warmup {args.warmup} and --decay-steps {args.decay_steps}: more than the {steps} "
            "of --steps"
        )
    if steps % every or every % args.save_every:
        parser.error(
            f"--steps {steps}, --test-every {every}, --save-every {args.save_every}: each has to "
            "be a multiple of the next"
        )
    args.epoch_steps, args.epochs = every, steps // every
    args.saves_per_epoch = every // args.save_every
    args.warmup_epochs = args.warmup / every
    text.check_arguments(args, parser)
    return args


def main():
    args = parse_arguments()
    with Run(args, args.save_dir, "--dir", log_dir=args.log_dir) as run:
        train_language_model(args, run)


def train_language_model(args, run):
    utils.set_seed(args.randomseed)
    model, train, test = set_up(args)
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

    sgd.train(run, model, train, test, factor, state=state)


if __name__ == "__main__":
    run_script(main)

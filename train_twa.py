"""Trains the averaging coefficients over a window of checkpoints (Li et al., ICLR 2023).

    python train_twa.py --datasets CIFAR100 --arch VGG16BN --params_start 0 --params_end 101 \\
        --epochs 10 --save-dir results/checkpoints --log-dir results

Reads `N.pt` from --save-dir and what is known of the run that left them from --log-dir. Writes
`twa.pt`, an ordinary state_dict, `twa.json` (the results) and `twa.png` to --out. Start and end are
chosen by the loss on training images; test data choose nothing. The paper's method, with its end
as it comes: --opt SGD --extract Schmidt --schedule step --lr 2 --train_start -1.

Under `torchrun` each rank holds model and basis, or a shard of them (--parallel), and all else is
the same.
"""

import math
import time
from pathlib import Path

import models
import utils
from training import (
    coefficients,
    data,
    flags,
    image_folders,
    parallel,
    ranks,
    report,
    text,
    windows,
)
from training.files import write_json
from training.flags import number
from training.loop import Trainer, evaluate, reestimate_bn, sample_loss, set_up, skipped_images
from training.optimizers import SCHEDULES, step_of_the_paper
from training.run import Run, run_script
from twa import best_start
from twa.files.checkpoints import Checkpoint, load_into


def parse_arguments():
    parser = flags.Parser("trains the averaging coefficients over a window of checkpoints")
    images = (*models.ARCHITECTURES, *models.imagenet.CLASSIFIERS)
    architectures = dict.fromkeys((*images, *models.LANGUAGE_MODELS))
    datasets = (*data.DATASETS, image_folders.NAME, text.NAME)
    flags.add_data_set_arguments(parser, architectures, datasets, default="VGG16BN")
    flags.add_training_arguments(parser)
    add = parser.add_argument
    add("--out", metavar="DIR", help="where everything is written; left out, --log-dir")
    epochs_help = "epochs over the training set, or over its held-out part with --split"
    add("--epochs", type=number(int, 0), help=f"{epochs_help}; left out, 100, of text 1")
    windows.add_arguments(parser)
    coefficients.add_arguments(parser, schedule="linear")
    flags.add_recipe_arguments(parser)
    add("--accumulate", "-acc", type=number(int, 1), default=1, help="batches per projected step")
    parallel.add_arguments(parser)
    flags.add_launch_arguments(parser)
    flags.add_image_arguments(parser, None)
    text.add_arguments(parser)
    steps_help = "steps of an epoch of text; left out, as many as the text has batches"
    add("--steps", dest="epoch_steps", type=number(int, 1), help=steps_help)
    parser.set_defaults(print_freq=200)  # as in the paper's release
    args = parser.parse_args()
    image_folders.check_arguments(args, parser)
    if args.epochs is None:
        args.epochs = 1 if args.datasets == text.NAME else 100
    text.check_arguments(args, parser)
    # The folder of the checkpoints may be others' as well: nothing is written there.
    if Path(args.out or args.log_dir).resolve() == Path(args.save_dir).resolve():
        if args.out:
            parser.error(f"--out {args.out}: is --save-dir, the folder of the checkpoints")
        args.out = str(Path(args.save_dir) / "twa")
    args.out = args.out or args.log_dir
    return coefficients.check_arguments(args)


def main():
    args = parse_arguments()
    flags.check_launch(args)
    flags.check_recipe(args)
    with Run(args, args.out, "--out", prefix="twa_") as run:
        train_twa(args, run)


def train_twa(args, run):
    utils.set_seed(args.randomseed)
    out = Path(args.out)
    layout = parallel.Layout(args)
    model, train, test = set_up(args, on_held_out=True, shard=layout.shard)
    run.set_data(model, train, test)
    on_imagenet, on_text = (args.datasets == name for name in (image_folders.NAME, text.NAME))
    unit, quality = ("steps", "loss") if on_text else ("epochs", "accuracy")

    def measure(checkpoint: Checkpoint | None = None) -> dict[str, float]:
        """Measures the model, with the weights of `checkpoint` or its own.

        Batch norm's statistics belong to the data: every solution has its own.
        """
        if checkpoint is not None:
            load_into(model, checkpoint)
        reestimate_bn(model, train, args.amp, image_folders.BN_IMAGES if on_imagenet else None)
        return test.measures(evaluate(model, test, args.amp, on_imagenet))

    sgd = report.SGDRun.read(Path(args.log_dir), unit)
    if on_text:
        text.check_run(sgd.arguments, args)
    window = windows.paths_of(args)
    spent = sgd.spent(args.params_end - 1)

    def measure_averages() -> dict[str, dict[str, float]]:
        averages = windows.averages_of(window, model)
        return {name: measure(checkpoint) for name, checkpoint in averages.items()}

    averages = run.once("averages", measure_averages, window)
    solutions = {name: measured | spent for name, measured in averages.items()}
    if args.evaluate:
        skipped = skipped_images(train, test)
        if ranks.rank() == 0:
            print("\n".join(filter(None, [report.table(solutions), skipped])))
        return
    full, last = sgd.end, sgd.last_checkpoint(Path(args.save_dir))
    if last:
        full |= run.once("end of SGD", lambda: measure(last), [last])

    def loss(last: bool = False) -> float:
        return sample_loss(model, train, args.amp, last)

    def search() -> dict:
        started = time.perf_counter()
        losses = best_start(model, window, loss).losses
        return {"losses": losses, "seconds": time.perf_counter() - started}

    searched = {"losses": {}, "seconds": 0.0}
    if windows.is_searched(args):
        searched = run.once("start", search, window)
    start, checkpoint, compared = windows.start_of(window, args, model, searched["losses"])
    if start not in solutions:
        files = [*window, checkpoint] if isinstance(checkpoint, Path) else window
        solutions[start] = run.once(start, lambda: measure(checkpoint), files) | spent
    started = time.perf_counter()
    steps = args.epochs * math.ceil(len(train) / args.accumulate)
    samples = math.inf if on_text else len(train.split)
    how = {"start": checkpoint, "process_group": layout.group, "steps": steps, "samples": samples}
    optimizer = coefficients.optimizer_of(args, model, window, **how)
    build_seconds = searched["seconds"] + time.perf_counter() - started
    factor = step_of_the_paper(args.epochs) if args.schedule == "step" else SCHEDULES[args.schedule]
    trainer = Trainer.of(args, model, train, test, optimizer, factor, top5=on_imagenet, name="TWA ")
    late = coefficients.LateMean(optimizer, steps)
    run.restore(trainer, late=late)
    run.start(
        f"{args.arch} on {args.datasets}: TWA over checkpoints {args.params_start} to "
        f"{args.params_end - 1} from {start}: {coefficients.described(optimizer)} in "
        f"{build_seconds:.1f} s"
    )
    if ranks.world() > 1:
        run.log.line(layout.line)
    if compared:
        run.log.line(f"start: {coefficients.comparison(compared)}")
    for note in sgd.notes(args):
        run.log.line(f"note: {note}")
    run.train()

    end, started = {}, time.perf_counter()
    if args.extract == "PCA":
        end = coefficients.keep_best(optimizer, late, lambda: loss(last=True))
        run.log.line(f"end: {coefficients.comparison(end)}")
    seconds = build_seconds + sum(m["seconds"] for m in run.log.epochs)
    seconds += time.perf_counter() - started
    tested = measure()
    ranks.save_model(model, out / "twa.pt")
    share = args.val_ratio / 100 if args.split and not on_text else 1
    further = {unit: args.epochs * (trainer.steps_an_epoch if on_text else share)}
    solutions["TWA"] = tested | report.more(spent, **further, seconds=seconds)
    alpha = coefficients.averaging_weights(optimizer)
    skipped = skipped_images(train, test)
    if ranks.rank() > 0:
        return
    averaging_weights = {path.name: a for path, a in zip(window, alpha, strict=True)}
    results = {
        "results": solutions,
        "averaging_weights": averaging_weights,
        "epochs": args.epochs,
        "seconds": seconds,
        "build_seconds": build_seconds,
        "lr": optimizer.defaults["lr"],
        "start": start,
        "sample_losses": {"start": compared, "end": end},
        "sgd": full,
    }
    write_json(results, out / "twa.json")
    report.figure(
        out / "twa.png",
        f"{args.arch} on {args.datasets}",
        curves=sgd.curves,
        points={name: (s[unit], s[quality]) for name, s in solutions.items()},
        averaging_weights=averaging_weights,
        loss=on_text,
    )
    if full and spent[unit] is not None and full[unit] > spent[unit]:
        solutions[f"{'AdamW' if on_text else 'SGD'} to its end"] = full
    written = ", ".join(str(out / f"twa.{kind}") for kind in ("pt", "json", "png"))
    for line in filter(None, (report.table(solutions), skipped, f"written: {written}")):
        run.log.line(line)


if __name__ == "__main__":
    run_script(main)

"""Trains the averaging coefficients over a window of checkpoints (Li et al., ICLR 2023).

    python train_twa.py --datasets CIFAR100 --arch VGG16BN --params_start 0 --params_end 101 \\
        --epochs 10 --save-dir results/checkpoints --log-dir results

Reads `N.pt` from --save-dir and the log of the run that left them from --log-dir. Writes
`twa.pt`, an ordinary state_dict, `twa.json` (the results) and `twa.png` to --out. Start and end are
chosen by the loss on training images; test data choose nothing. The paper's method, with its end
as it comes: --opt SGD --extract Schmidt --schedule step --lr 2 --train_start -1.

Under `torchrun` each rank holds model and basis, or a shard of them (--parallel), and all else is
the same.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import models
import utils
from training import coefficients, data, entry, flags, parallel, ranks, report, tasks, text, windows
from training.locks import lock
from training.logs import write_json
from training.loop import Trainer
from training.optimizers import SCHEDULES, step_of_the_paper
from training.runs import Run
from training.settings import flag, free
from twa.files.checkpoints import load_into
from utils import UserError

ARCHITECTURES = dict.fromkeys(  # each once
    (*models.ARCHITECTURES, *models.imagenet.CLASSIFIERS, *models.LANGUAGE_MODELS)
)


@dataclass(kw_only=True)
class Settings(
    flags.Model,
    flags.DataSet,
    windows.WindowSettings,
    coefficients.Coefficients,
    flags.Recipe,
    flags.HeadStage,
    flags.ImageFolder,
    text.TextSettings,
    parallel.Parallel,
    flags.Launch,
):
    """trains the averaging coefficients over a window of checkpoints"""

    arch: str = flag("VGG16BN", choices=ARCHITECTURES)
    datasets: str = flag("CIFAR10", choices=(*data.DATASETS, flags.IMAGE_FOLDER, flags.TEXT))
    out: str | None = free(None, "output folder (default: --log-dir)", metavar="DIR")
    epochs: int | None = flag(
        None,
        "epochs over the training set, or over its held-out part with --split (default: 100, for "
        "text 1)",
        low=0,
    )
    epoch_steps: int | None = flag(
        None, "steps per epoch of text (default: as many as the text has batches)", "--steps", low=1
    )
    accumulate: int = flag(1, "batches per projected step", "--accumulate", "-acc", low=1)
    print_freq: int = 200  # as in the paper's release

    def check(self):
        if self.epochs is None:
            self.epochs = 1 if self.datasets == flags.TEXT else 100
        # The folder of the checkpoints may be others' as well: nothing is written there.
        if Path(self.out or self.log_dir).resolve() == Path(self.save_dir).resolve():
            if self.out:
                raise UserError(f"--out {self.out}: is --save-dir, the folder of the checkpoints")
            self.out = str(Path(self.save_dir) / "twa")
        self.out = self.out or self.log_dir


def main():
    args = Settings.parse()
    with lock(args.out, writes=not args.evaluate):
        train_twa(args)


def train_twa(args):
    utils.set_seed(args.randomseed)
    out, log_dir, save_dir = Path(args.out), Path(args.log_dir), Path(args.save_dir)
    layout, task = parallel.Layout(args), tasks.of(args, on_held_out=True)
    model = task.build(layout.shard)
    sgd = report.SGDRun.read(log_dir, task.unit)
    task.check_run(sgd.arguments)
    window = windows.Window(args)
    window.verify()
    spent = sgd.spent(window.last)
    solutions = {}
    for name, checkpoint in windows.averages_of(window.paths, model).items():
        load_into(model, checkpoint)
        solutions[name] = task.measure(model) | spent
    if args.evaluate:
        lines = [report.table(solutions), task.skipped()]
        if ranks.rank() == 0:
            print("\n".join(filter(None, lines)))
        return
    full = sgd.measured_end(model, save_dir, lambda: task.measure(model))

    started = time.perf_counter()
    start, checkpoint, compared = window.start_point(model, lambda: task.loss(model))
    steps = args.epochs * -(-len(task.train) // args.accumulate)
    how = {"steps": steps, "samples": task.samples, "process_group": layout.group}
    optimizer = coefficients.optimizer_of(args, model, window.paths, start=checkpoint, **how)
    build_seconds = time.perf_counter() - started
    if start not in solutions:  # the model is there now
        solutions[start] = task.measure(model) | spent
    factor = step_of_the_paper(args.epochs) if args.schedule == "step" else SCHEDULES[args.schedule]
    of_task = {"top5": task.top5, "name": "TWA "}
    trainer = Trainer.of(args, model, task.train, task.test, optimizer, factor, **of_task)
    late = coefficients.LateMean(optimizer, steps)
    state = {"state": out / "twa_state.pt", "log_dir": out, "flag": "--out", "prefix": "twa_"}
    run = Run(args, trainer, late=late, **state)
    run.keep_other_results()
    run.start(
        f"{args.arch} on {args.datasets}: TWA over checkpoints {window.first} to {window.last} "
        f"from {start}: {coefficients.described(optimizer)} in {build_seconds:.1f} s"
    )
    if ranks.world() > 1:
        run.log.line(layout.line(optimizer))
    if compared:
        run.log.line(f"start: {coefficients.comparison(compared)}")
    for note in sgd.notes(args):
        run.log.line(f"note: {note}")
    run.train()

    end, started = {}, time.perf_counter()
    if args.extract == "PCA":
        end = coefficients.keep_best(optimizer, late, lambda: task.loss(model, last=True))
        run.log.line(f"end: {coefficients.comparison(end)}")
    seconds = build_seconds + sum(m["seconds"] for m in run.log.epochs)
    seconds += time.perf_counter() - started
    tested = task.measure(model)
    ranks.save_model(model, out / "twa.pt")
    cost = task.cost(args.epochs, steps)
    solutions["TWA"] = tested | report.more(spent, **cost, seconds=seconds)
    alpha, skipped = coefficients.averaging_weights(optimizer), task.skipped()
    if ranks.rank() > 0:
        return
    averaging_weights = {path.name: a for path, a in zip(window.paths, alpha, strict=True)}
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
        points={name: (s[task.unit], s[task.quality]) for name, s in solutions.items()},
        averaging_weights=averaging_weights,
        loss=task.quality == "loss",
    )
    if full and spent[task.unit] is not None and full[task.unit] > spent[task.unit]:
        solutions[f"{task.baseline} to its end"] = full
    written = ", ".join(str(out / f"twa.{kind}") for kind in ("pt", "json", "png"))
    for line in filter(None, (report.table(solutions), skipped, f"written: {written}")):
        run.log.line(line)


if __name__ == "__main__":
    entry.run(main)

"""Trains the averaging coefficients over a window of checkpoints (Li et al., ICLR 2023).

    python train_twa.py --datasets CIFAR100 --arch VGG16BN --params_start 0 --params_end 101 \\
        --epochs 10 --save-dir results/checkpoints --log-dir results

Reads `N.pt` from --save-dir, and from --log-dir what the run that saved them has recorded. Writes
`twa.pt`, an ordinary state_dict, `twa.json` (the results), `twa.png` and `twa_weights.safetensors`
(the averaging weights of each parameter, for `twa average --weights`) to --out. The loss on
training data chooses start and final iterate; test data choose nothing. The paper's method, which
keeps the last iterate: --opt SGD --extract Schmidt --schedule step --lr 2 --train_start -1.

Under `torchrun` each rank has model and basis, or a shard of them (--parallel).
"""

import time
from dataclasses import dataclass
from pathlib import Path

import models
import utils
from training import coefficients, data, flags, parallel, ranks, report, tasks, text, windows
from training.loop import Trainer
from training.run import Run, run_script
from training.settings import flag, free
from twa import best_start
from twa.checkpoints import load_into
from twa.recipe import average_of
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
    with Run(args, args.out, "--out", prefix="twa_") as run:
        train_twa(args, run)


def train_twa(args, run):
    utils.set_seed(args.randomseed)
    layout, task = parallel.Layout(args), tasks.of(args, on_held_out=True)
    model = task.build(layout.shard)
    run.set_task(task, model)
    sgd = report.SGDRun.read(Path(args.log_dir), task)
    window = windows.Window(args).verified()
    spent = sgd.spent(window.last)

    def measured(weights) -> dict[str, float]:
        load_into(model, weights)
        return task.measure(model)

    def averages() -> dict[str, dict[str, float]]:
        return {name: measured(mean) for name, mean in window.averages(model).items()}

    found = run.once("averages", averages, window.paths)
    solutions = {name: metrics | spent for name, metrics in found.items()}
    if args.evaluate:
        return ranks.print_once(report.table(solutions), task.skipped())
    full, last = sgd.end, sgd.last_checkpoint(Path(args.save_dir))
    if last:
        full |= run.once("end of the run", lambda: measured(last), [last])
    start, losses, seconds = find_start(run, task, model, window)
    name = window.start_name(start)
    if name not in solutions:
        weights = start if isinstance(start, Path) else average_of(start, window.paths, model)
        solutions[name] = run.once(name, lambda: measured(weights), window.files) | spent

    started = time.perf_counter()
    steps = args.epochs * -(-len(task.train) // args.accumulate)
    how = {"steps": steps, "samples": task.samples, "start": start}
    recipe = coefficients.recipe_of(args, model, window.paths, lambda: task.loss(model), **how)
    optimizer = coefficients.optimizer_of(args, recipe, process_group=layout.group)
    seconds += time.perf_counter() - started
    how = {"factor": coefficients.factor_of(args), "top5": task.top5, "name": "TWA "}
    trainer = Trainer.of(args, model, task.train, task.test, optimizer, **how)
    run.restore(trainer, recipe=recipe)
    run.start(
        f"{args.arch} on {args.datasets}: TWA over checkpoints {window.first} to {window.last} "
        f"from {name}: {coefficients.described(optimizer)} in {seconds:.1f} s",
        *(layout.line, coefficients.comparison("start", losses)),
        *(f"note: {note}" for note in (*window.notes, *sgd.notes(args))),
    )
    run.train()
    started, build_seconds = time.perf_counter(), seconds
    end = recipe.finish(lambda: task.loss(model, last=True))
    run.log.line(coefficients.comparison("end", end))
    seconds += sum(m["seconds"] for m in run.log.epochs) + time.perf_counter() - started
    cost = report.more(spent, **task.cost(args.epochs, steps), seconds=seconds)
    solutions["TWA"] = task.measure(model) | cost
    ranks.save_model(model, run.folder / "twa.pt")
    results = {
        "results": solutions,
        "averaging_weights": coefficients.averaging_weights(optimizer, window.paths, run.folder),
        **{"epochs": args.epochs, "seconds": seconds, "build_seconds": build_seconds},
        **{"lr": optimizer.defaults["lr"], "start": name, "granularity": recipe.granularity},
        **{"sample_losses": {"start": losses, "end": end}, "sgd": full},
    }
    run.log.line(report.write_results(run.folder, results, sgd, task), task.skipped())


def find_start(run, task, model, window) -> tuple[float | Path, dict[str, float], float]:
    """The start point, the losses by which it was chosen, by name, and the seconds this took."""

    def search() -> dict:
        started = time.perf_counter()
        losses = best_start(model, window.paths, lambda: task.loss(model)).losses
        return {"losses": losses, "seconds": time.perf_counter() - started}

    if window.start is not None:
        return window.start, {}, 0.0
    found = run.once("start", search, window.paths)
    start = min(found["losses"], key=found["losses"].get)
    return start, window.named(found["losses"]), found["seconds"]


if __name__ == "__main__":
    run_script(main)

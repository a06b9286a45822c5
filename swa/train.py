"""SGD with Stochastic Weight Averaging (Izmailov et al., UAI 2018): the tail stage's first half.

    python train.py --dir ../results/swa --dataset CIFAR100 --model VGG16BN --epochs 300 \\
        --lr_init 0.1 --wd 5e-4 --swa --swa_start 161 --swa_lr 0.05

Saves `<dir>/checkpoints/N.pt` after every epoch N (0: the initialisation), the resumable
`state.pt` and the average, `swa.pt`, beside them; `swa.json` and `swa.png` go to `<dir>`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataclasses import dataclass

from torch.optim.lr_scheduler import ConstantLR, SequentialLR
from torch.optim.swa_utils import SWALR, AveragedModel

import models
import utils
from training import data, flags, optimizers, ranks, report, tasks
from training.files import write_json
from training.loop import Trainer
from training.run import Run, run_script
from training.settings import REQUIRED, derived, flag, free
from utils import UserError


@dataclass(kw_only=True)
class Settings(
    flags.Model,
    flags.DataSet,
    flags.Batch,
    flags.TrainingSet,
    flags.Workers,
    flags.Overwrite,
    flags.Run,
):
    """SGD with stochastic weight averaging"""

    log_dir: str = free(REQUIRED, "output folder", "--dir")
    datasets: str = flag("CIFAR10", None, "--dataset", choices=tuple(data.DATASETS))
    data_dir: str = free("./datasets", None, "--data_path")
    batch_size: int = flag(128, None, "--batch_size")
    workers: int = free(4, None, "--num_workers")
    arch: str = flag(REQUIRED, None, "--model", choices=models.ARCHITECTURES)
    epochs: int = flag(200, "total number of epochs", low=1)
    save_freq: int = free(1, "epochs between resumable states", "--save_freq", low=1)
    eval_freq: int = free(5, "epochs between tests of the average", "--eval_freq", low=1)
    lr_init: float = flag(0.1, "initial learning rate", "--lr_init", **flags.SCALE)
    momentum: float = flag(0.9, "momentum of SGD", low=0, high=1)
    wd: float = flag(1e-4, "weight decay", **flags.SCALE)
    swa: bool = flag(False, "average from --swa_start on")
    swa_start: int = flag(161, "first epoch that is averaged", "--swa_start", low=1)
    swa_lr: float = flag(0.05, "learning rate of the tail", "--swa_lr", **flags.SCALE)
    swa_c_epochs: int = flag(1, "epochs between averaged ones", "--swa_c_epochs", low=1)
    randomseed: int = flag(1, None, "--seed")
    save_dir: str | None = derived()

    def check(self):
        if self.swa and self.swa_start > self.epochs:
            raise UserError(f"--swa_start {self.swa_start} lies past --epochs {self.epochs}")
        self.save_dir = str(Path(self.log_dir) / "checkpoints")


def swa_schedule(optimizer, args, epoch_steps: int) -> SequentialLR:
    """Constant for half of the head, linear to the tail's rate until 0.9 of it, then constant.

    The head lasts until --swa_start. Without --swa it is the whole run, and the last rate is
    0.01 · --lr_init.
    """
    head = (args.swa_start if args.swa else args.epochs) * epoch_steps
    tail_rate = args.swa_lr if args.swa else 0.01 * args.lr_init
    constant = ConstantLR(optimizer, factor=1.0, total_iters=0)
    decay = SWALR(optimizer, tail_rate, anneal_epochs=round(0.4 * head), anneal_strategy="linear")
    return SequentialLR(optimizer, [constant, decay], milestones=[round(0.5 * head)])


def main():
    args = Settings.parse()
    with Run(args, args.save_dir, "--dir", log_dir=args.log_dir) as run:
        train_swa(args, run)


def train_swa(args, run):
    utils.set_seed(args.randomseed)
    log_dir, save_dir = Path(args.log_dir), Path(args.save_dir)
    task = tasks.of(args)
    model = task.build()
    run.set_task(task, model)
    average = AveragedModel(model)
    base, settings = optimizers.chosen("sgd", args.lr_init, args.wd, args.momentum)
    optimizer = base(model.parameters(), **settings)
    scheduler = swa_schedule(optimizer, args, len(task.train))
    trainer = Trainer(
        *(model, task.train, task.test, optimizer, scheduler, args.epochs),
        amp=args.amp,
        print_every=args.print_freq,
    )
    run.restore(trainer, average=average)
    run.start(f"{args.arch} on {args.datasets}: epochs {run.done} to {args.epochs}")
    if run.is_before_first_step:
        ranks.save_model(model, save_dir / "0.pt")

    def update_average(epoch: int) -> None:
        ranks.save_model(model, save_dir / f"{epoch}.pt")
        past_start = epoch - args.swa_start
        if args.swa and past_start >= 0 and past_start % args.swa_c_epochs == 0:
            average.update_parameters(model)

    def test_average(epoch: int, metrics: dict) -> None:
        if not args.swa:
            return
        averaged = {"loss": None, "accuracy": None}
        if epoch >= args.swa_start and (epoch % args.eval_freq == 0 or epoch == args.epochs):
            averaged = task.measure(average)
        metrics |= {f"SWA_{key}": value for key, value in averaged.items()}
        metrics["seconds"] = metrics.pop("seconds")  # stays the last column

    run.train(after_training=update_average, after_epoch=test_average)

    if args.swa:
        ranks.save_model(average.module, save_dir / "swa.pt")
    tested = task.measure(model)  # like the average, with batch norm re-estimated
    if ranks.rank() > 0:
        return
    trained = report.SGDRun.read(log_dir)
    results = {"SGD": trained.end | tested}
    if args.swa:
        last = {key: trained.metrics[-1][f"SWA_{key}"] for key in ("loss", "accuracy")}
        results["SWA"] = trained.end | last
    write_json({"results": results}, log_dir / "swa.json")
    report.figure(
        log_dir / "swa.png",
        f"{args.arch} on {args.datasets}",
        curves=trained.curves,
        points={name: (s["epochs"], s["accuracy"]) for name, s in results.items()},
    )
    run.log.line(report.table(results))
    run.log.line(f"written: {save_dir}, {log_dir / 'swa.json'}, {log_dir / 'swa.png'}")


if __name__ == "__main__":
    run_script(main)

"""SGD with Stochastic Weight Averaging (Izmailov et al., UAI 2018): the tail stage's first half.

    python train.py --dir ../results/swa --dataset CIFAR100 --model VGG16BN --epochs 300 \\
        --lr_init 0.1 --wd 5e-4 --swa --swa_start 161 --swa_lr 0.05

Saves `<dir>/checkpoints/N.pt` after every epoch N (0: the initialisation), the resumable
`state.pt` and the average, `swa.pt`, beside them; `swa.json` and `swa.png` go to `<dir>`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch.optim.lr_scheduler import ConstantLR, SequentialLR
from torch.optim.swa_utils import SWALR, AveragedModel

import models
import utils
from training import data, flags, optimizers, ranks, report
from training.files import write_json
from training.flags import number
from training.loop import Trainer, evaluate, reestimate_bn, set_up
from training.run import Run, run_script


def parse_arguments():
    parser = flags.Parser("SGD with stochastic weight averaging")
    add = parser.add_argument
    add("--dir", dest="log_dir", required=True, help="where everything is written")
    add("--dataset", dest="datasets", default="CIFAR10", choices=data.DATASETS, help="data set")
    add("--data_path", dest="data_dir", default="./datasets", help="where data sets lie")
    add("--batch_size", type=number(int, 1), default=128, help="images per step")
    workers = {"dest": "workers", "type": number(int, 0), "default": 4}
    add("--num_workers", **workers, help=flags.WORKERS_HELP)
    flags.add_model_arguments(parser, "--model", choices=models.ARCHITECTURES)
    add("--epochs", type=number(int, 1), default=200, help="epochs in all")
    add("--save_freq", type=number(int, 1), default=1, help="epochs between resumable states")
    add("--eval_freq", type=number(int, 1), default=5, help="epochs between tests of the average")
    add("--lr_init", type=flags.scale, default=0.1, help="initial learning rate")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="momentum of SGD")
    add("--wd", type=flags.scale, default=1e-4, help="weight decay")
    add("--swa", action="store_true", help="average from --swa_start on")
    add("--swa_start", type=number(int, 1), default=161, help="first epoch that is averaged")
    add("--swa_lr", type=flags.scale, default=0.05, help="learning rate of the tail")
    add("--swa_c_epochs", type=number(int, 1), default=1, help="epochs between averaged ones")
    seed = {"dest": "randomseed", "type": number(int, 0, 2**31 - 1), "default": 1}
    add("--seed", **seed, help="seed of all randomness")
    flags.add_data_arguments(parser)
    add("--overwrite", action="store_true", help=flags.OVERWRITE_HELP)
    flags.add_run_arguments(parser)
    args = parser.parse_args()
    if args.swa and args.swa_start > args.epochs:
        parser.error(f"--swa_start {args.swa_start} lies past --epochs {args.epochs}")
    args.save_dir = str(Path(args.log_dir) / "checkpoints")
    return args


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
    args = parse_arguments()
    with Run(args, args.save_dir, "--dir", log_dir=args.log_dir) as run:
        train_swa(args, run)


def train_swa(args, run):
    utils.set_seed(args.randomseed)
    log_dir, save_dir = Path(args.log_dir), Path(args.save_dir)
    model, train, test = set_up(args)
    run.set_data(model, train, test)
    average = AveragedModel(model)
    base, settings = optimizers.chosen("sgd", args.lr_init, args.wd, args.momentum)
    optimizer = base(model.parameters(), **settings)
    scheduler = swa_schedule(optimizer, args, len(train))
    trainer = Trainer(
        *(model, train, test, optimizer, scheduler, args.epochs),
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
            reestimate_bn(average, train, args.amp)
            averaged = evaluate(average, test, args.amp)
        metrics |= {f"SWA_{key}": value for key, value in averaged.items()}
        metrics["seconds"] = metrics.pop("seconds")  # stays the last column

    run.train(after_training=update_average, after_epoch=test_average)

    if args.swa:
        ranks.save_model(average.module, save_dir / "swa.pt")
    reestimate_bn(model, train, args.amp)  # the two are compared, and the average has its own
    tested = evaluate(model, test, args.amp)
    if ranks.rank() > 0:
        return
    sgd = report.SGDRun.read(log_dir)
    results = {"SGD": sgd.end | tested}
    if args.swa:
        last = {key: sgd.metrics[-1][f"SWA_{key}"] for key in ("loss", "accuracy")}
        results["SWA"] = sgd.end | last
    write_json({"results": results}, log_dir / "swa.json")
    report.figure(
        log_dir / "swa.png",
        f"{args.arch} on {args.datasets}",
        curves=sgd.curves,
        points={name: (s["epochs"], s["accuracy"]) for name, s in results.items()},
    )
    run.log.line(report.table(results))
    run.log.line(f"written: {save_dir}, {log_dir / 'swa.json'}, {log_dir / 'swa.png'}")


if __name__ == "__main__":
    run_script(main)

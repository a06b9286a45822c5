"""The end of the stage: every solution in one table and one figure, and a line that each writes.

    python show.py --dir ../results/lm --decay-dir ../results/lm/decay --out ../results/lm

Reads what `train.py` left in --dir, its decay in --decay-dir and `train_twa.py` in --out; writes
`lm.json` and `lm.png` there.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataclasses import dataclass

import torch

import models
from training import report, settings, text
from training.files import read_json, write_json
from training.run import run_script
from training.settings import REQUIRED, flag
from twa.checkpoints import average, load_into
from utils import UserError


@dataclass(kw_only=True)
class Settings(settings.Settings):
    """compares the language models of one run, and lets each write a line"""

    dir: Path = flag(REQUIRED, "folder of the run at a constant rate")
    decay_dir: Path = flag(REQUIRED, "folder of its decay")
    out: Path = flag(REQUIRED, "output folder of TWA, where the table and the figure go, too")
    prompt: str = flag("def ", "text that the models continue")
    tokens: int = flag(60, "number of tokens that each of them writes", low=0)

    def check(self):
        if not self.prompt:
            raise UserError("--prompt: is empty; give a text to continue")


@torch.no_grad()
def write(model: torch.nn.Module, tokens: list[int], count: int, context: int) -> list[int]:
    """`tokens` and `count` more, drawn at temperature 0.7 with the same luck for every model."""
    draws = torch.Generator().manual_seed(1)
    for _ in range(count):
        logits = model(torch.tensor([tokens[-context:]]))[0, -1]
        likely = torch.softmax(logits.float() / 0.7, 0)
        tokens = [*tokens, int(torch.multinomial(likely, 1, generator=draws))]
    return tokens


def main():
    args = Settings.parse()
    run, decay = (report.SGDRun.read(path, unit="steps") for path in (args.dir, args.decay_dir))
    twa = read_json(args.out / "twa.json")
    for path, found in ((args.dir, run.end), (args.decay_dir, decay.end), (args.out, twa)):
        if not found:
            raise UserError(f"{path}: holds no results; the run is not finished")
    solutions = twa.get("results", {})
    if "steps" not in solutions.get("last", {}):
        raise UserError(f"{args.out / 'twa.json'}: is not of language models; give their --out")
    best, window = solutions.pop("TWA"), list(twa["averaging_weights"])
    spent = {key: solutions["last"][key] for key in ("steps", "seconds")}
    name = f"decay, {decay.arguments['decay']}"
    further = {key: decay.end[key] for key in spent}
    solutions |= {name: decay.end | report.more(spent, **further), "TWA": best}
    write_json({"results": solutions}, args.out / "lm.json")
    report.figure(
        args.out / "lm.png",
        f"{run.arguments['arch']} on text",
        curves=run.curves,
        points={key: (values["steps"], values["loss"]) for key, values in solutions.items()},
        averaging_weights=twa["averaging_weights"],
        loss=True,
    )
    print(report.table(solutions))

    counts = {"last": 1, "SWA": len(window)}
    counts |= {key: int(key.split()[-1]) for key in solutions if key.startswith("mean of last")}
    folder, decayed = args.dir / "checkpoints", Path(decay.arguments["save_dir"])
    checkpoints = {
        key: [folder / file for file in window[-count:]] for key, count in counts.items()
    }
    number = len(decay.metrics) * decay.saves_per_epoch
    checkpoints |= {name: [decayed / f"{number}.pt"], "TWA": [args.out / "twa.pt"]}
    vocabulary = text.Vocabulary.read(run.arguments["tokenizer"])
    context = run.arguments["context"]
    model = models.gpt.build(run.arguments["arch"], vocabulary.size, context).eval()
    prompt = vocabulary.encode(args.prompt.encode(), args.out).tolist()
    for key, paths in checkpoints.items():
        load_into(model, average(paths))
        line = vocabulary.decode(write(model, prompt, args.tokens, context))
        print(f"{key:>15}: {line!r}")
    print(f"written: {args.out / 'lm.json'}, {args.out / 'lm.png'}")


if __name__ == "__main__":
    run_script(main)

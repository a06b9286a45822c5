"""`twa average`: equal to float64 sums, in every format, by each library's own reader."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from twa import TWA
from twa.checkpoints import load_state_dict
from twa.command import choice
from twa.command.main import main, parser
from twa.files.weights import save_weights
from twa.formats import load, verify

ROOT = Path(__file__).resolve().parents[1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Names of no architecture; one tensor is larger than a piece, one empty, one a scalar."""
    draws = torch.Generator().manual_seed(seed)
    return {
        "experts.0.w": torch.randn(700, 500, generator=draws).to(dtype),
        "unet/down.1:conv": torch.randn(4, 3, 2, 2, generator=draws).to(dtype),
        "scale": torch.randn((), generator=draws).to(dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
        "steps": torch.tensor(seed),
        "mask": torch.tensor([0.0, -torch.inf]),
    }


def reference(states: list[dict], alphas: list[float], dtype=None) -> dict[str, Tensor]:
    """The sums in float64, a checkpoint after the other, divided at the end."""
    mean = {}
    for key, last in states[-1].items():
        if key == "mask" or not last.is_floating_point():
            mean[key] = last if dtype is None or not last.is_floating_point() else last.to(dtype)
            continue
        terms = (alpha * one[key].double() for one, alpha in zip(states, alphas, strict=True))
        mean[key] = (sum(terms) / sum(alphas)).to(dtype or last.dtype)
    return mean


def same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


def write(path: Path, content: dict) -> Path:
    """In the format that the suffix says; a name without one is a folder of DCP."""
    if path.suffix == ".safetensors":
        save_file(content, path, metadata={"format": "pt"})
    elif path.suffix:
        torch.save(content, path)
    else:
        dcp.save({"model": content, "step": 3}, checkpoint_id=path, no_dist=True)
    return path


def read(path: Path) -> dict:
    """By the library whose format it is."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix:
        return torch.load(path, weights_only=True)
    target = {"model": {key: torch.empty_like(value) for key, value in state(0).items()}}
    target["model"] = {k: v.to(load(path)["model"][k].dtype) for k, v in target["model"].items()}
    dcp.load(target, checkpoint_id=path, no_dist=True)
    return target["model"]


def run(capsys, *args) -> tuple[int, str, str]:
    status = main([*map(str, ("average", *args))])
    return status, *capsys.readouterr()


def refused(capsys, *args) -> str:
    status, _, err = run(capsys, *args)
    assert status == 2
    assert err.count("\n") == 1
    return err


@pytest.fixture
def window(tmp_path) -> Path:
    """Ten checkpoints, whose names do not sort as their steps."""
    folder = tmp_path / "run"
    folder.mkdir()
    for step in range(1, 11):
        write(folder / f"step-{step}.safetensors", state(step))
    return folder


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ""])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", ["mean", "ema=0.7", "wsm", "wsm=linear"])
def test_an_average_equals_float64_sums_to_the_bit(tmp_path, capsys, suffix, dtype, how):
    states = [state(seed, dtype) for seed in range(3)]
    paths = [write(tmp_path / f"{i}{suffix}", one) for i, one in enumerate(states)]
    out = tmp_path / f"out{suffix}"
    assert run(capsys, *paths, "-o", out, "--how", how)[0] == 0
    record = json.loads(
        (out / "twa.json" if out.is_dir() else tmp_path / "out.twa.json").read_text()
    )
    expected = {
        "mean": [1] * 3,
        "ema=0.7": [0.7**2, 0.7, 1],
        "wsm": [(1 / 3) ** 0.5, (2 / 3) ** 0.5 - (1 / 3) ** 0.5, 1 - (2 / 3) ** 0.5],
        "wsm=linear": [1] * 3,
    }
    total = sum(expected[how])
    assert record["weights"] == pytest.approx([weight / total for weight in expected[how]])
    assert record["inputs"] == [str(path) for path in paths]
    same(read(out), reference(states, expected[how]))
    verify(out)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ""])
def test_another_dtype(tmp_path, capsys, suffix):
    states = [state(seed) for seed in range(3)]
    paths = [write(tmp_path / f"{i}{suffix}", one) for i, one in enumerate(states)]
    out = tmp_path / f"out{suffix}"
    assert run(capsys, *paths, "-o", out, "--dtype", "bfloat16")[0] == 0
    same(read(out), reference(states, [1] * 3, torch.bfloat16))


def test_of_a_folder_the_last_half_in_the_order_of_steps(window, tmp_path, capsys):
    status, out, _ = run(capsys, window, "-o", tmp_path / "out.safetensors")
    assert status == 0
    assert [line.split()[0][-14:] for line in out.splitlines()[1:6]] == [
        *(f"ep-{step}.safetensors"[-14:] for step in range(6, 11)),
    ]
    states = [state(step) for step in range(6, 11)]
    same(load_file(tmp_path / "out.safetensors"), reference(states, [1] * 5))
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    "args, steps",
    [
        (["--last", 3], [8, 9, 10]),
        (["--from", 4, "--to", 6], [4, 5, 6]),
        (["--every", 4], [2, 6, 10]),
        (["--from", 2, "--every", 3, "--last", 2], [7, 10]),
        (["--best", 2, "--losses", "losses.csv"], [3, 7]),
        (["--best", 2, "--losses", "losses.jsonl"], [3, 7]),
    ],
)
def test_what_is_chosen(window, tmp_path, capsys, monkeypatch, args, steps):
    losses = {step: 1 + abs(step - 5) for step in range(1, 11)} | {3: 0.1, 7: 0.2}
    lines = [f"{step},{loss}" for step, loss in losses.items()]
    (tmp_path / "losses.csv").write_text("\n".join(["step,loss", *lines]))
    rows = [json.dumps({"step": step, "loss": loss}) for step, loss in losses.items()]
    (tmp_path / "losses.jsonl").write_text("\n".join(rows))
    monkeypatch.chdir(tmp_path)
    assert run(capsys, window, "-o", "out.safetensors", *args)[0] == 0
    found = json.loads(Path("out.twa.json").read_text())
    assert found["inputs"] == [str(window / f"step-{step}.safetensors") for step in steps]


def test_weights_that_are_given_and_several_ways_from_one_reading(tmp_path, capsys):
    states = [state(1), state(2)]
    a, b = (write(tmp_path / f"{name}.pt", s) for name, s in zip("ab", states, strict=True))
    assert run(capsys, f"{a}:1.4", f"{b}:0.6", "-o", tmp_path / "out.pt")[0] == 0
    same(read(tmp_path / "out.pt"), reference(states, [1.4, 0.6]))
    both = ["--how", "mean", "--how", "ema=0.5"]
    assert run(capsys, a, b, "-o", tmp_path / "several", *both)[0] == 0
    same(read(tmp_path / "several/mean.pt"), reference(states, [1, 1]))
    same(read(tmp_path / "several/ema=0.5.pt"), reference(states, [0.5, 1]))


def test_losses_that_trainers_leave(tmp_path):
    checkpoint = tmp_path / "checkpoint-500"
    checkpoint.mkdir()
    history = [{"step": 400, "eval_loss": 3.0}, {"step": 500, "loss": 1.0}]
    history.append({"step": 500, "eval_loss": 2.0})
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert choice.loss_of(checkpoint) == 2.0
    assert choice.loss_of(tmp_path / "epoch=3-val_loss=0.125.ckpt") == 0.125
    assert choice.loss_of(tmp_path / "7.pt") is None


def test_metrics_in_names_are_no_steps(tmp_path, capsys):
    for epoch, loss in ((9, "0.50"), (10, "0.30"), (11, "0.40")):
        write(tmp_path / f"epoch={epoch}-val_loss={loss}.ckpt", {"state_dict": state(epoch)})
    assert run(capsys, tmp_path, "-o", tmp_path / "out.ckpt", "--best", 2)[0] == 0
    found = json.loads((tmp_path / "out.twa.json").read_text())["inputs"]
    assert [Path(path).name[:8] for path in found] == ["epoch=10", "epoch=11"]


def test_what_a_training_left_beside_the_weights(tmp_path, capsys):
    """The rest of a container stays, but for optimizers; tied weights stay tied."""
    paths = []
    for seed in (1, 2):
        tied = torch.randn(3, 2, generator=torch.Generator().manual_seed(seed))
        content = {
            "state_dict": {"a": tied, "b": tied},
            "epoch": seed,
            "hyper_parameters": {"x": 1},
        }
        content["optimizer_states"] = [{"state": {0: torch.ones(5)}}]
        paths.append(write(tmp_path / f"{seed}.ckpt", content))
    assert run(capsys, *paths, "-o", tmp_path / "out.ckpt")[0] == 0
    found = torch.load(tmp_path / "out.ckpt", weights_only=True)
    assert found.keys() == {"state_dict", "epoch", "hyper_parameters"}
    assert found["epoch"] == 2
    tensors = found["state_dict"]
    assert tensors["a"].data_ptr() == tensors["b"].data_ptr()
    expected = sum(load_state_dict(path)["a"].double() for path in paths) / 2
    assert torch.equal(tensors["a"], expected.float())


def test_a_folder_of_shards_with_its_settings(tmp_path, capsys):
    for seed in (1, 2):
        folder, tensors = tmp_path / f"checkpoint-{seed}", state(seed)
        folder.mkdir()
        names = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(tensors)}  # as steps
        for name in set(names.values()):
            save_file({k: v for k, v in tensors.items() if names[k] == name}, folder / name)
        index = {"metadata": {"total_size": 1}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        for name in ("config.json", "tokenizer.json", "trainer_state.json"):
            (folder / name).write_text("{}")
        torch.save({}, folder / "optimizer.pt")
        torch.save({}, folder / "training_args.bin")
    out = tmp_path / "average"
    assert run(capsys, tmp_path, "-o", out, "--last", 2)[0] == 0
    shards = {"model-0.safetensors", "model-1.safetensors", "model.safetensors.index.json"}
    assert {path.name for path in out.iterdir()} == shards | {
        "config.json",
        "tokenizer.json",
        "twa.json",
    }
    same(dict(load(out)), reference([state(1), state(2)], [1, 1]))
    both = [tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"]
    assert run(capsys, *both, "-o", out, "--overwrite")[0] == 0
    same(dict(load(out)), reference([state(1), state(2)], [1, 1]))


class Net(nn.Module):
    """Weights of every arrangement: channels in the first and in the second dimension, vectors."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 6, 2, groups=2)
        self.head = nn.Linear(6, 3)

    def forward(self, images):
        return self.head(self.up(self.norm(self.conv(images))).mean((2, 3)))


@pytest.mark.parametrize("granularity", ["model", "layer", "channel"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_weights_that_twa_has_learned_make_its_model(tmp_path, capsys, granularity, prefix):
    torch.manual_seed(0)
    paths = []
    for i in range(4):
        content = {f"{prefix}{key}": value for key, value in Net().state_dict().items()}
        paths.append(write(tmp_path / f"{i}.pt", {"state_dict": content}))
    model = Net()
    optimizer = TWA(model, paths, granularity=granularity, lr=0.3)
    for _ in range(5):
        model(torch.randn(4, 2, 5, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    named = optimizer.named_averaging_weights()
    for name, parameter in model.named_parameters():
        states = [load_state_dict(path)[prefix + name].double() for path in paths]
        total = sum(a * state for a, state in zip(named[name], states, strict=True))
        torch.testing.assert_close(total.float(), parameter.detach(), rtol=1e-5, atol=1e-5)
    save_weights(named, paths, tmp_path / "twa_weights.safetensors")
    (tmp_path / "twa.json").write_text("{}")
    out = tmp_path / "out.pt"
    for file in ("twa_weights.safetensors", "twa.json"):
        how = ["--weights", tmp_path / file, "--overwrite"]
        assert run(capsys, *paths, "-o", out, *how)[0] == 0
        found = load_state_dict(out)
        for name, parameter in model.named_parameters():
            value = found[prefix + name]
            torch.testing.assert_close(value, parameter.detach(), rtol=1e-5, atol=1e-5)
    last = load_state_dict(paths[-1])
    assert torch.equal(found[f"{prefix}norm.running_var"], last[f"{prefix}norm.running_var"])
    how = ["--weights", tmp_path / "twa.json"]
    assert "is for 3.pt as well" in refused(capsys, *paths[:3], "-o", tmp_path / "new.pt", *how)
    assert "--last: --weights says" in refused(capsys, *paths, "-o", out, *how, "--last", 2)


# --- refusals ---


def test_errors_are_one_line(window, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    one = window / "step-1.safetensors"
    assert "there is no such" in refused(capsys, window / "gone", "-o", out)
    assert "no names of checkpoints" in refused(capsys, tmp_path / "run/..", "-o", out)
    assert "is the only checkpoint" in refused(capsys, one, "-o", out)
    assert "with a step in [50," in refused(capsys, window, "-o", out, "--from", 50)
    assert "--how median: must be" in refused(capsys, window, "-o", out, "--how", "median")
    assert "--how ema=1.5" in refused(capsys, window, "-o", out, "--how", "ema=1.5")
    assert "sum to 0" in refused(capsys, f"{one}:1", f"{window}/step-2.safetensors:-1", "-o", out)
    assert "its loss is not known" in refused(capsys, window, "-o", out, "--best", 2)
    assert "is there already" in refused(capsys, window, "-o", one)
    assert "one of the inputs" in refused(capsys, window, "-o", window, "--overwrite")
    other = write(tmp_path / "other.safetensors", state(1) | {"scale": torch.ones(2)})
    assert "of another architecture: scale" in refused(capsys, other, one, "-o", out)
    odd = state(1)
    odd["experts.0.w"][3, 3] = torch.nan
    odd = write(tmp_path / "odd.safetensors", odd)
    assert f"{odd}: experts.0.w holds NaN" in refused(capsys, odd, one, "-o", out)
    assert f"{odd}: experts.0.w holds NaN" in refused(capsys, one, odd, "-o", out)
    assert {path.name for path in tmp_path.iterdir()} == {
        "run",
        "other.safetensors",
        "odd.safetensors",
    }


def test_copies_count_once_and_a_dry_run_writes_nothing(window, tmp_path, capsys):
    os.link(window / "step-10.safetensors", window / "step-11.safetensors")
    args = (window, "-o", tmp_path / "out.safetensors", "--last", 3)
    status, out, err = run(capsys, *args, "--dry-run")
    assert status == 0
    assert "step-11.safetensors is the same as" in err
    assert "reads 0.00 GB, writes 0.00 GB" in out
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert run(capsys, *args)[0] == 0
    same(load_file(tmp_path / "out.safetensors"), reference([state(9), state(10)], [1, 1]))


def test_another_run_and_warm_up_are_said(tmp_path, capsys):
    for step, loss in ((100, 9.0), (200, 9.0), (300, 8.0)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file(state(step), folder / "model.safetensors")
        rates = [(10, loss, 1e-5), (150, 3.0, 1e-4), (300, 2.0, 9e-5)]
        log = [{"step": s, "loss": v, "learning_rate": r} for s, v, r in rates if s <= step]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    err = run(capsys, tmp_path, "-o", tmp_path / "out", "--last", 3)[2]
    assert f"{tmp_path}/checkpoint-300 is of another run than {tmp_path}/checkpoint-200" in err
    assert f"{tmp_path}/checkpoint-100 is from the warm-up, before step 150" in err


def test_an_old_average_stays_until_the_new_one_is_whole(window, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"before")
    monkeypatch.setattr("twa.command.outputs.SafeTensors.write", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(capsys, window, "-o", out, "--overwrite")
    assert out.read_bytes() == b"before"
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out.safetensors"}
    monkeypatch.undo()
    assert run(capsys, window, "-o", out, "--overwrite")[0] == 0
    assert load_file(out).keys() == state(1).keys()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_kill_leaves_nothing_that_looks_whole(tmp_path, capsys, kind):
    """At random moments; the next run removes what is left."""
    inputs = []
    for seed in range(3):
        path = (
            tmp_path / f"{seed}.safetensors" if kind == "file" else tmp_path / f"checkpoint-{seed}"
        )
        path.mkdir() if kind == "folder" else None
        big = {f"{i}": torch.full((2**20,), float(seed)) for i in range(8)}
        save_file(big, path / "model.safetensors" if kind == "folder" else path)
        inputs.append(str(path))
    out = tmp_path / ("out.safetensors" if kind == "file" else "out")
    command = [sys.executable, "-m", "twa", "average", *inputs, "-o", str(out)]
    draws = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("reads"):
                break
        time.sleep(draws.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if out.exists():
            break
    assert run(capsys, *inputs, "-o", out, "--overwrite")[0] == 0
    assert not list(tmp_path.glob(".*"))
    assert all((value == 1).all() for value in load(out).values())


def test_a_file_that_may_not_grow_is_one_line(window, tmp_path):
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    out = tmp_path / "out.safetensors"
    command = [sys.executable, "-m", "twa", "average", str(window), "-o", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2
    assert f"{out}: cannot be written (File too large)" in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_commands_of_the_page_are_understood():
    page = (ROOT / "docs/average.md").read_text()
    lines = [line.partition("#")[0] for line in page.splitlines() if line.startswith("    twa ")]
    assert len(lines) == 7
    for line in lines:
        assert parser().parse_args(shlex.split(line)[1:]).paths

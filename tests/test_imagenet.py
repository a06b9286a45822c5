"""Image folders: the loader, and SGD and TWA on JPEG files, one of which is truncated."""

import os
import runpy
import shutil
import signal
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from processes import ROOT, on_ranks, run_reduced
from reduced import Reduced
from sklearn.datasets import load_digits
from test_parallel import difference, results
from test_parallel import succeed as succeed_on
from test_scripts import (
    assert_equal,
    call,
    killed_in,
    names,
    one_line,
    read_lines,
    succeed,
    without_seconds,
)
from torch.nn import functional as F
from torchvision import transforms
from torchvision.models import get_model, vision_transformer

import models
from training import data, image_folders, settings, tasks
from training.loop import Totals
from twa.files.checkpoints import load_state_dict
from utils import UserError

SGD, TWA = "train_sgd_imagenet.py", "train_twa.py"
CPU = torch.device("cpu")
TRUNCATED = "train/3/2.jpg"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """Ten classes of Digits as JPEG files of 64×64 pixels, six to train on and three to test on."""
    root = tmp_path_factory.mktemp("images") / "sound"
    digits = load_digits()
    for label in range(10):
        images = (digits.images[digits.target == label] * (255 / 16)).astype(np.uint8)
        for i in range(9):
            file = root / ("train" if i < 6 else "val") / str(label) / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i]).resize((64, 64)).save(file)
    return root


@pytest.fixture(scope="module")
def folder(sound) -> Path:
    """The same, with one file truncated."""
    root = shutil.copytree(sound, sound.parent / "folder")
    (root / TRUNCATED).write_bytes((sound / TRUNCATED).read_bytes()[:700])
    return root


@pytest.fixture
def copy(sound, tmp_path) -> Path:
    """Images for a test to do as it likes with."""
    return shutil.copytree(sound, tmp_path / "images")


# --- the loader ---


def loader(folder: Path, train: bool = True, **arguments) -> image_folders.Loader:
    split = image_folders.load(folder, 32)[0 if train else 1]
    settings = {"batch_size": 19, "workers": 0, "device": CPU} | arguments
    return image_folders.Loader(split, train=train, **settings)


def epoch_of(loader: image_folders.Loader, epoch: int = 1) -> list:
    loader.set_epoch(epoch)
    return list(loader)


def assert_same(actual: list, expected: list) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_draws_depend_on_seed_epoch_and_position_alone(sound):
    one, two = loader(sound), loader(sound, workers=2)
    before = torch.get_rng_state()
    expected = epoch_of(one)
    assert torch.equal(torch.get_rng_state(), before)
    sizes = [len(labels) for _, labels in expected]
    assert sizes == [19, 19, 19, 3] == [one.images_in(batch) for batch in range(len(one))]
    next(iter(two))  # an iteration that is broken off
    two.set_epoch(1)
    assert_same(list(two.batches(start=2)), expected[2:])
    assert_same(epoch_of(two), expected)
    assert torch.equal(torch.get_rng_state(), before)
    for others in (epoch_of(two, 2), epoch_of(loader(sound, seed=1))):
        assert not any(torch.equal(a, b) for (a, _), (b, _) in zip(others, expected, strict=True))


def test_ranks_share_every_batch(sound):
    whole = loader(sound)
    ranks = [loader(sound, rank=rank, world=4) for rank in range(4)]
    shares = [epoch_of(rank) for rank in ranks]
    for batch, expected in enumerate(epoch_of(whole)):  # of the last one, a rank has nothing
        mine = [share[batch] for share in shares]
        together = [torch.cat([part[k][part[1] >= 0] for part in mine]) for k in (0, 1)]
        assert_same([together], [expected])
    whole_batches = [list(rank.whole_batches(4)) for rank in ranks]
    assert_same([batches[0] for batches in whole_batches], epoch_of(whole))


def test_an_epoch_has_every_image_once_mirrored_or_not_and_cropped(copy):
    gradient = np.broadcast_to(np.arange(64, dtype=np.uint8) * 4, (64, 64))
    for file in copy.glob("train/*/*.jpg"):
        Image.fromarray(gradient).save(file)
    ((images, labels),) = epoch_of(loader(copy, batch_size=60))
    assert labels.bincount().tolist() == [6] * 10
    rows = images[:, 0, 16]
    mirrored = (rows[:, 0] > rows[:, -1]).sum()
    assert 15 <= mirrored <= 45
    spans = (rows[:, 0] - rows[:, -1]).abs() / rows.std()
    assert len({round(float(row.max() - row.min()), 2) for row in rows}) > 20  # widths differ
    assert spans.min() > 0


def test_test_images_are_those_of_pytorchs_example(sound):
    plain = plain_test_set(sound)
    batches = list(loader(sound, train=False, channels_last=True))
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)
    images, labels = (torch.cat([batch[k] for batch in batches]) for k in (0, 1))
    torch.testing.assert_close(images, plain[0], atol=1e-5, rtol=0, check_stride=False)
    assert torch.equal(labels, plain[1])


def plain_test_set(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """All test images at once, for a model that takes 32×32 pixels."""
    transform = transforms.Compose(
        [
            transforms.Resize(37),  # 32 · 256 / 224
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    samples = list(torchvision.datasets.ImageFolder(folder / "val", transform))
    return torch.stack([image for image, _ in samples]), torch.tensor([y for _, y in samples])


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_files_are_skipped_and_named_and_all_else_is_as_without_them(sound, copy, workers):
    damage = {
        "train/0/0.jpg": (sound / "train/0/0.jpg").read_bytes()[:700],
        "train/1/1.jpg": b"",
        "train/2/2.jpg": b"no image",
    }
    for file, content in damage.items():
        (copy / file).write_bytes(content)
    damaged = loader(copy, workers=workers)
    actual, expected = epoch_of(damaged), epoch_of(loader(sound))
    assert damaged.skipped == {str(copy / file) for file in damage}
    skipped = 0
    for (images, labels), (good_images, good_labels) in zip(actual, expected, strict=True):
        left = labels >= 0
        assert torch.equal(images[left], good_images[left])
        assert torch.equal(labels[left], good_labels[left])
        assert images[~left].abs().max() < 0.02 if not left.all() else True  # the mean colour
        skipped += int((labels == -100).sum())
    assert skipped == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_strict_images_stop_at_the_first_damaged_file(folder, workers):
    with pytest.raises(UserError, match=rf"{TRUNCATED}.*truncated.*--strict-images"):
        epoch_of(loader(folder, strict=True, workers=workers))


def test_a_file_that_cannot_be_opened_is_no_damaged_image(copy):
    images = loader(copy)
    (copy / TRUNCATED).unlink()
    with pytest.raises(UserError, match=rf"{TRUNCATED}: cannot be opened \(No such file"):
        epoch_of(images)


def test_top_5_equals_a_plain_computation():
    torch.manual_seed(0)
    outputs, labels = torch.randn(40, 20), torch.randint(20, (40,))
    labels[:3] = -100
    loss = F.cross_entropy(outputs, labels, reduction="sum")
    totals = Totals(CPU, top5=True)
    totals.add(loss, outputs, labels)
    ranks = [
        sorted(range(20), key=lambda c: -row[c]).index(y)
        for row, y in zip(outputs[3:].tolist(), labels[3:].tolist(), strict=True)
    ]
    found = totals.read()
    assert found["top5_accuracy"] == pytest.approx(100 * sum(r < 5 for r in ranks) / 37)
    assert found["accuracy"] == pytest.approx(100 * sum(r < 1 for r in ranks) / 37)
    assert found["loss"] == pytest.approx(float(loss) / 37)


# --- the whole path ---


def common(run: Path, arch: str, workers: int) -> list:
    model = ["--arch", arch, "--image-size", 32, "--batch-size", 16, "-j", workers]
    return [*model, "--save-dir", run / "checkpoints", "--log-dir", run]


def sgd_flags(folder: Path, run: Path, arch: str = "resnet18", workers: int = 0) -> list:
    recipe = ["--epochs", 2, "--saves-per-epoch", 2, "--lr", 0.02]
    return [folder, *common(run, arch, workers), *recipe]


def twa_flags(folder: Path, run: Path, arch: str = "resnet18", workers: int = 0) -> list:
    window = ["--epochs", 1, "--params_start", 1, "--params_end", 5, "--lr", 0.1]
    where = ["--datasets", "ImageNet", "--data-dir", folder]
    return [*where, *common(run, arch, workers), *window]


@pytest.fixture(scope="module", params=["resnet18", "vit_b_16"])
def alone(request, folder, tmp_path_factory) -> tuple[str, Path]:
    """SGD and TWA in one process."""
    arch, run = request.param, tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision_transformer, "VisionTransformer", Reduced)
        succeed(call(SGD, *sgd_flags(folder, run, arch, workers=1)))
        succeed(call(TWA, *twa_flags(folder, run, arch)))
    return arch, run


@pytest.fixture(scope="module")
def resnet(folder, tmp_path_factory) -> Path:
    """SGD in one process."""
    run = tmp_path_factory.mktemp("resnet")
    succeed(call(SGD, *sgd_flags(folder, run)))
    return run


def measured(folder: Path, arch: str, checkpoint: Path) -> dict[str, float]:
    """Top-1 and top-5 of a checkpoint, by torchvision's model and transforms alone."""
    reduced = {} if arch == "resnet18" else {"image_size": 32}
    model = get_model(arch, num_classes=10, **reduced)
    model.load_state_dict(load_state_dict(checkpoint))
    images, labels = plain_test_set(folder)
    with torch.no_grad():
        best = model.eval()(images).topk(5).indices == labels.unsqueeze(1)
    hits = {"accuracy": best[:, 0].sum(), "top5_accuracy": best.sum()}
    return {key: 100 * int(count) / len(labels) for key, count in hits.items()}


def assert_reported(values: dict, expected: dict, prefix: str = "") -> None:
    for key, value in expected.items():
        assert values[prefix + key] == pytest.approx(value), key


def test_sgd_then_twa(alone, folder, monkeypatch):
    monkeypatch.setattr(vision_transformer, "VisionTransformer", Reduced)
    arch, run = alone
    checkpoints = run / "checkpoints"
    saved = {f"{i}.pt" for i in range(5)} | {"state.pt"}
    assert names(checkpoints) == saved
    first, second = read_lines(run / "metrics.jsonl")
    assert_reported(first, measured(folder, arch, checkpoints / "2.pt"), "test_")
    assert_reported(second, measured(folder, arch, checkpoints / "4.pt"), "test_")
    assert_reported(results(run)["TWA"], measured(folder, arch, run / "twa.pt"))
    skipped = f"skipped 1 images that cannot be read: {folder / TRUNCATED}"
    assert (run / "log").read_text().count(skipped) == 2  # by SGD and by TWA


def test_a_run_goes_on_with_the_same_classes_alone_wherever_they_lie(resnet, copy, tmp_path):
    run = shutil.copytree(resnet, tmp_path / "run")
    (copy / TRUNCATED).unlink()
    succeed(call(SGD, *sgd_flags(copy, run), "--resume"))
    for part in ("train", "val"):
        (copy / part / "9").rename(copy / part / "nine")
    line = one_line(call(SGD, *sgd_flags(copy, run), "--resume"))
    assert "was saved with data_dir of 10 classes" in line


def test_sgd_then_twa_on_two_ranks(alone, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(vision_transformer, "VisionTransformer", Reduced)
    arch, expected = alone
    succeed_on(2, SGD, *sgd_flags(folder, tmp_path, arch, workers=1), run=run_reduced)
    checkpoints = tmp_path / "checkpoints"
    if arch == "vit_b_16":  # which has no batch norm
        assert difference(checkpoints / "4.pt", expected / "checkpoints/4.pt") < 1e-3
    else:
        (_, last) = read_lines(tmp_path / "metrics.jsonl")
        assert_reported(last, measured(folder, arch, checkpoints / "4.pt"), "test_")
        for path in (expected / "checkpoints").glob("[0-9].pt"):
            shutil.copy(path, checkpoints)
    succeed_on(2, TWA, *twa_flags(folder, tmp_path, arch), run=run_reduced)
    if arch == "vit_b_16":
        assert difference(tmp_path / "twa.pt", expected / "twa.pt") < 1e-3
    for name in ("SWA", "last"):  # batch norm is re-estimated alike on any number of ranks
        loss = results(expected)[name]["loss"]
        assert results(tmp_path)[name]["loss"] == pytest.approx(loss, rel=1e-3)
    assert_reported(results(tmp_path)["TWA"], measured(folder, arch, tmp_path / "twa.pt"))
    log = (tmp_path / "log").read_text()
    assert log.count(f"skipped 1 images that cannot be read: {folder / TRUNCATED}") == 2


def test_a_run_stopped_in_mid_epoch_ends_with_the_weights_of_an_uninterrupted_run(
    resnet, folder, tmp_path
):
    arguments = sgd_flags(folder, tmp_path, workers=1)
    with killed_in(epoch=2):
        call(SGD, *arguments)
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 1
    succeed(call(SGD, *arguments, "--resume"))
    for number in range(5):
        name = f"checkpoints/{number}.pt"
        assert_equal(load_state_dict(tmp_path / name), load_state_dict(resnet / name))
    metrics = "metrics.jsonl"
    assert without_seconds(tmp_path / metrics) == without_seconds(resnet / metrics)


def test_twa_stopped_in_mid_epoch_ends_with_the_weights_of_an_uninterrupted_run(
    resnet, folder, tmp_path
):
    runs = [shutil.copytree(resnet, tmp_path / name) for name in ("whole", "stopped")]
    more = ["--epochs", 2, "--randaugment", 9]
    succeed(call(TWA, *twa_flags(folder, runs[0]), *more))
    with killed_in(epoch=2):
        call(TWA, *twa_flags(folder, runs[1]), *more)
    assert not (runs[1] / "twa.pt").exists()
    succeed(call(TWA, *twa_flags(folder, runs[1]), *more, "--resume"))
    expected, actual = (load_state_dict(run / "twa.pt") for run in runs)
    assert_equal(actual, expected)


def test_checkpoints_of_wrapped_models_load_as_they_are(resnet, folder, tmp_path):
    run = shutil.copytree(resnet, tmp_path / "run")
    evaluate = [*twa_flags(folder, run), "-e"]
    plain = succeed(call(TWA, *evaluate)).out
    for path in run.glob("checkpoints/[0-9].pt"):
        state = torch.load(path, weights_only=True)
        torch.save({f"module.{k}": v for k, v in state.items()}, path)
    wrapped = succeed(call(TWA, *evaluate)).out
    assert wrapped == plain
    assert "SWA" in wrapped and "top5 accuracy" in wrapped


def test_evaluate_prints_both_accuracies_and_what_was_skipped(resnet, folder, copy):
    state = ["--resume", resnet / "checkpoints/state.pt"]
    (copy / "val/4/7.jpg").write_bytes(b"no image")
    printed = succeed(call(SGD, *sgd_flags(copy, copy / "new"), "-e", *state)).out
    assert printed.startswith("test loss ") and " top-5 " in printed
    assert f"skipped 1 images that cannot be read: {copy / 'val/4/7.jpg'}" in printed
    assert not (copy / "new").exists()


def test_the_rate_falls_every_thirty_epochs_and_a_start_epoch_counts(folder, tmp_path):
    flags = [*sgd_flags(folder, tmp_path), "--saves-per-epoch", 1, "--start-epoch"]
    succeed(call(SGD, *flags, 59, "--epochs", 61))
    metrics = read_lines(tmp_path / "metrics.jsonl")
    assert [m["epoch"] for m in metrics] == [60, 61]
    assert [m["rate"] for m in metrics] == pytest.approx([0.02 * 0.1, 0.02 * 0.01])
    assert names(tmp_path / "checkpoints") == {"59.pt", "60.pt", "61.pt", "state.pt"}


def test_held_out_images_are_those_that_sgd_does_not_train_on(folder):
    train, _ = image_folders.load(folder, 32)
    rest, held_out = train.hold_out(20, seed=1)
    assert (len(rest), len(held_out)) == (48, 12)
    assert {*rest.images, *held_out.images} == {*train.images}
    for file, label in zip(held_out.images, held_out.labels, strict=True):
        assert Path(os.fsdecode(file)).parent.name == str(int(label))


# --- what a user can mend: one line, exit status 2 ---


def test_strict_images_end_a_run_in_one_line(folder, tmp_path):
    line = one_line(call(SGD, *sgd_flags(folder, tmp_path, workers=1), "--strict-images"))
    assert str(folder / TRUNCATED) in line


@pytest.mark.slow
def test_strict_images_end_every_rank(folder, tmp_path):
    done = on_ranks(2, SGD, *sgd_flags(folder, tmp_path, workers=1), "--strict-images")
    assert done.status != 0
    (line,) = [line for line in done.err.splitlines() if TRUNCATED in line]
    assert "error: " in line and "--strict-images" in line
    assert "UserError" not in done.err


def test_a_worker_that_dies_ends_the_run_in_one_line(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(image_folders, "decode", lambda file: os.kill(os.getpid(), signal.SIGKILL))
    line = one_line(call(SGD, *sgd_flags(folder, tmp_path, workers=1)))
    assert "DataLoader worker" in line and "--workers" in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_that_reaches_a_worker_first_stops_the_run_in_order(
    folder, tmp_path, monkeypatch, number
):
    """As schedulers send it, to every process of a job in any order."""
    decode, marker = image_folders.decode, tmp_path / "sent"

    def signalled(file):
        if not marker.exists():
            marker.touch()
            for process in (os.getpid(), os.getppid()):
                os.kill(process, number)
        return decode(file)

    monkeypatch.setattr(image_folders, "decode", signalled)
    run = tmp_path / "run"
    stopped = call(SGD, *sgd_flags(folder, run, workers=1))
    assert stopped.status == 128 + number
    (line,) = stopped.err.splitlines()
    assert line.startswith(f"stopped by {number.name}; the state is saved")
    succeed(call(SGD, *sgd_flags(folder, run, workers=1), "--resume"))


def test_images_of_a_folder_are_a_fair_sample(sound, tmp_path):
    flags = [*sgd_flags(sound, tmp_path), "--images"]

    def sample(count: int, *more) -> data.Split:
        kind = runpy.run_path(str(ROOT / SGD))["Settings"]
        parser = settings.parser_of(kind)
        args = kind(**vars(parser.parse_args([*map(str, flags), str(count), *map(str, more)])))
        return tasks.of(args).train.split

    drawn = sample(20)
    assert len(drawn) == 20 and len(drawn.labels.unique()) > 5
    for file, label in zip(drawn.images, drawn.labels, strict=True):
        assert Path(os.fsdecode(file)).parent.name == str(int(label))
    assert {*sample(20).images} == {*drawn.images} != {*sample(20, "--seed", 2).images}
    everything, _ = image_folders.load(sound, 32)
    assert sample(60).images.tolist() == sample(99).images.tolist() == everything.images.tolist()
    assert sample(60).spec == everything.spec != drawn.spec  # no run goes on with other images


def spoil(folder: Path, how: str) -> None:
    if how == "no val":
        shutil.rmtree(folder / "val")
    elif how == "no classes":
        shutil.rmtree(folder / "train")
        (folder / "train").mkdir()
    elif how == "an empty class":
        for file in (folder / "val/5").iterdir():
            file.unlink()
    elif how == "a class that train lacks":
        shutil.rmtree(folder / "train/7")
    elif how == "a file":
        shutil.rmtree(folder)
        folder.write_text("")


@pytest.mark.parametrize("script", [SGD, TWA])
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no val", ["val: ", "No such file"]),
        ("no classes", ["train: ", "class folder"]),
        ("an empty class", ["val: ", "classes 5"]),
        ("a class that train lacks", ["train: lacks the class folder 7", "val has"]),
        ("a file", ["train: ", "holds train/ and val/"]),
    ],
)
def test_folders_that_are_none_are_refused(script, how, words, copy, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for number in range(1, 5):
        (run / f"checkpoints/{number}.pt").touch()
    spoil(copy, how)
    line = one_line(call(script, *(sgd_flags if script == SGD else twa_flags)(copy, run)))
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--arch", "ResNet18"], "ResNet18"),
        (["--arch", "fcn_resnet50"], "fcn_resnet50"),
        (["--arch", "inception_v3"], "inception_v3"),
        (["--arch", "alexnet"], "--image-size"),
        (["--arch", "vit_b_16", "--image-size", 33], "vit_b_16: does not take images of 33"),
        (["--image-size", 0], "--image-size"),
        (["--saves-per-epoch", 5], "--saves-per-epoch"),
        (["--start-epoch", 3], "--start-epoch"),
        (["--workers", -1], "--workers"),
        (["--warmup-epochs", 3], "--warmup-epochs"),
        (["--device", "cpu", "--gpu", 3], "--gpu 3 and --device cpu"),
        (["--gpu", 99], "--gpu 99: there are "),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_odd_values_are_refused(folder, tmp_path, flags, words):
    assert words in one_line(call(SGD, *sgd_flags(folder, tmp_path), *flags))
    assert not list(tmp_path.iterdir())


def test_flags_of_image_folders_and_models_of_other_data_sets_are_refused(resnet, folder):
    digits = ["--datasets", "Digits", "--params_end", 5, "--save-dir", resnet / "checkpoints"]
    for flags in (["--image-size", 64], ["--strict-images"]):
        assert "--datasets ImageNet" in one_line(call(TWA, *digits, *flags))
    line = one_line(call(TWA, *twa_flags(folder, resnet), "--arch", "VGG16BN"))
    assert "VGG16BN" in line and "vgg16_bn" in line
    assert "--arch resnet34: " in one_line(call(TWA, *digits, "--arch", "resnet34"))
    for flags in (digits, twa_flags(folder, resnet)):
        assert "--arch gpt: " in one_line(call(TWA, *flags, "--arch", "gpt"))


# --- a model of the user's own ---


def test_a_model_of_the_users_own(folder, tmp_path, monkeypatch):
    (tmp_path / "own_images.py").write_text(
        "import models\ndef net():\n    return models.build('PreResNet20', 10, 3, 32)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    sgd, twa = sgd_flags(folder, tmp_path / "run"), twa_flags(folder, tmp_path / "run")
    for flags in (sgd, twa):
        at = flags.index("--arch")
        flags[at : at + 2] = ["--model-factory", "own_images:net"]
    line = one_line(call(SGD, *sgd, "--pretrained"))
    assert "--pretrained" in line and "--arch" in line
    succeed(call(SGD, *sgd))
    succeed(call(TWA, *twa))
    trained = torch.load(tmp_path / "run/twa.pt", weights_only=True)
    assert trained.keys() == models.build("PreResNet20", 10, 3, 32).state_dict().keys()


# --- pretrained weights ---


def test_pretrained_weights_are_the_start(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    weights = get_model("squeezenet1_1").state_dict()  # as large as downloads go
    file = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2]
    (tmp_path / "home/hub/checkpoints").mkdir(parents=True)
    torch.save(weights, tmp_path / "home/hub/checkpoints" / file)
    flags = ["--arch", "squeezenet1_1", "--pretrained", "--epochs", 0]
    succeed(call(SGD, *sgd_flags(folder, tmp_path), *flags))
    start = load_state_dict(tmp_path / "checkpoints/0.pt")
    head = {"classifier.1.weight", "classifier.1.bias"}
    assert_equal(
        {k: v for k, v in start.items() if k not in head},
        {k: v for k, v in weights.items() if k not in head},
    )
    assert len(start["classifier.1.bias"]) == 10


def test_pretrained_weights_that_are_not_to_be_had(folder, tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    line = one_line(call(SGD, *sgd_flags(folder, tmp_path / "run"), "--pretrained"))
    assert "--pretrained" in line and "resnet18" in line and "no route to host" in line
    assert str(tmp_path / "home") in line
    assert not (tmp_path / "run").exists()

"""Data: the loader against one image at a time; files that are there, damaged, or absent."""

import gzip
import hashlib
import pickle
import tarfile
import urllib.request
from itertools import islice
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision import datasets
from torchvision.transforms import functional as TF

from training import data
from training.data import DATASETS, Loader, Split
from utils import UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No network, and no data set installed on the machine."""

    def refuse(*args, **kwargs):
        raise URLError("no\nnetwork")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(data, "_DEBIAN_FASHION_MNIST", tmp_path / "not installed")


def random_split(name: str = "CIFAR10", n: int = 50) -> Split:
    """Noise in the format of a data set."""
    spec = DATASETS[name]
    generator = torch.Generator().manual_seed(1)
    shape = (n, spec.channels, spec.size, spec.size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return Split(images, torch.arange(n), spec)


def whole_epoch(loader: Loader, epoch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    loader.set_epoch(epoch)
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


# --- the loader ---


@pytest.mark.parametrize(
    "name, size, padding, mirrored",
    [("Digits", 8, 1, False), ("FashionMNIST", 28, 2, True), ("CIFAR10", 32, 4, True)],
)
def test_augmentation_equals_one_image_at_a_time(name, size, padding, mirrored):
    split = random_split(name)
    loader = Loader(split, 16, train=True, seed=3)
    images, labels = whole_epoch(loader, epoch=2)
    order, top, left, flip = (numbers.tolist() for numbers in loader.draw())
    assert labels.tolist() == order
    mean = torch.tensor(split.spec.mean, dtype=torch.float64).view(-1, 1, 1)
    std = torch.tensor(split.spec.std, dtype=torch.float64).view(-1, 1, 1)
    for position, index in enumerate(order):
        image = TF.pad(split.images[index], padding)
        image = TF.crop(image, top[position], left[position], size, size)
        if mirrored and flip[position]:
            image = TF.hflip(image)
        expected = (image.double() / 255 - mean) / std
        torch.testing.assert_close(images[position].double(), expected, rtol=1e-5, atol=1e-5)


def test_an_epoch_is_drawn_alike_on_every_device():
    here = random_split()
    there = Split(here.images.to("meta"), here.labels.to("meta"), here.spec)
    loaders = [Loader(split, 16, train=True, seed=3) for split in (here, there)]
    for ours, theirs in zip(*(loader.draw() for loader in loaders), strict=True):
        assert torch.equal(ours, theirs)


def test_without_training_images_come_in_order_and_as_they_are():
    split = random_split("CIFAR100")
    images, labels = whole_epoch(Loader(split, 16, train=False))
    assert torch.equal(labels, split.labels)
    mean = torch.tensor([0.4914, 0.4822, 0.4465], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.2023, 0.1994, 0.2010], dtype=torch.float64).view(3, 1, 1)
    expected = (split.images.double() / 255 - mean) / std
    torch.testing.assert_close(images.double(), expected, rtol=1e-5, atol=1e-5)
    assert images.dtype == torch.float32


@pytest.mark.parametrize("train", [True, False])
def test_batches_cover_the_split_and_the_last_is_smaller(train):
    loader = Loader(random_split(), 16, train=train)
    assert [len(labels) for _, labels in loader] == [16, 16, 16, 2]
    assert len(loader) == 4
    assert len(Loader(random_split(n=48), 16, train=train)) == 3


def test_every_epoch_is_another_permutation_and_can_be_drawn_again():
    loader = Loader(random_split(), 16, train=True)
    first, second = whole_epoch(loader, 0), whole_epoch(loader, 1)
    for _, labels in (first, second):
        assert sorted(labels.tolist()) == list(range(50))
    assert not torch.equal(first[1], second[1])
    for again in (whole_epoch(loader, 0), whole_epoch(Loader(random_split(), 16, train=True), 0)):
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])


def test_without_end_come_the_batches_of_epoch_1_and_2_and_so_on():
    loader = Loader(random_split(), 16, train=True)
    labels = torch.cat([labels for _, labels in islice(loader.endless(), 9)])
    expected = torch.cat([whole_epoch(loader, epoch)[1] for epoch in (1, 2, 3)])
    assert torch.equal(labels, expected[: 50 + 50 + 16])


def test_seeds_share_no_epoch():
    orders = set()
    for seed in range(-1, 3):
        for epoch in range(4):
            loader = Loader(random_split(), 16, train=True, seed=seed)
            orders.add(tuple(whole_epoch(loader, epoch)[1].tolist()))
    assert len(orders) == 16


def test_draws_are_uniform_and_independent():
    loader = Loader(random_split("FashionMNIST", n=20_000), 128, train=True)
    _, top, left, flip = loader.draw()
    counts = torch.bincount((top * 5 + left) * 2 + flip, minlength=50)
    # 50 cells of 400 expected: chi squared with 49 degrees of freedom exceeds 95 once in 10,000.
    assert len(counts) == 50
    assert ((counts - 400) ** 2 / 400).sum() < 95


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    whole_epoch(Loader(random_split(), 16, train=True))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("start", [0, 2, 3, 4])
def test_start_at_a_batch_gives_the_rest_of_the_epoch(train, start):
    loader = Loader(random_split(), 16, train=train)
    loader.set_epoch(5)
    everything, rest = list(loader), list(loader.batches(start=start))
    assert len(rest) == 4 - start
    for (images, labels), (expected_images, expected_labels) in zip(
        rest, everything[start:], strict=True
    ):
        assert torch.equal(images, expected_images)
        assert torch.equal(labels, expected_labels)


@pytest.mark.parametrize("train", [True, False])
def test_channels_last_changes_the_layout_alone(train):
    split = random_split()
    plain, last = (Loader(split, 16, train=train, channels_last=flag) for flag in (False, True))
    for (expected, _), (images, _) in zip(plain, last, strict=True):
        assert expected.is_contiguous()
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images, expected)


# --- reading ---


def test_digits():
    train, test = data.load("Digits", "unused", CPU)
    assert (len(train), len(test)) == (898, 899)
    per_class = torch.stack([split.labels.bincount(minlength=10) for split in (train, test)])
    assert (per_class[0] - per_class[1]).abs().max() <= 1
    assert train.labels[:12].tolist() == [8, 1, 4, 3, 1, 6, 2, 8, 6, 5, 2, 3]
    # Both halves together are the set itself, its grey levels 0..16 spread over 0..255.
    from sklearn.datasets import load_digits

    images = torch.cat([train.images, test.images])
    assert images.dtype == torch.uint8 and images.shape == (1797, 1, 8, 8)
    levels = (images.double() / 255 * 16).flatten(1).round().long().tolist()
    assert sorted(levels) == sorted(load_digits().data.astype(int).tolist())
    # The constants of the normalisation are those of the training images.
    normalised = whole_epoch(Loader(train, 898, train=False))[0]
    assert normalised.mean().item() == pytest.approx(0, abs=0.01)
    assert normalised.std().item() == pytest.approx(1, abs=0.01)


def test_unknown_data_set():
    with pytest.raises(UserError, match=r"MNISTT.*FashionMNIST"):
        data.load("MNISTT", "unused", CPU)


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def install_fashion_mnist(folder: Path) -> dict[str, np.ndarray]:
    """Gzipped IDX files of 12 training and 5 test images, named as in the package."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    arrays = {}
    for part, n in (("train", 12), ("t10k", 5)):
        arrays[f"{part}-images-idx3-ubyte"] = rng.integers(256, size=(n, 28, 28))
        arrays[f"{part}-labels-idx1-ubyte"] = rng.integers(10, size=n)
    for name, array in arrays.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    return arrays


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert message and "\n" not in message
    return message


def test_fashion_mnist_from_the_package(tmp_path, monkeypatch):
    package = tmp_path / "package"
    arrays = install_fashion_mnist(package)
    monkeypatch.setattr(data, "_DEBIAN_FASHION_MNIST", package)
    for _ in range(2):  # the second time, from the unpacked files alone
        train, test = data.load("FashionMNIST", tmp_path / "datasets", CPU)
        for split, part in ((train, "train"), (test, "t10k")):
            assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
            assert split.images.is_contiguous()
            assert np.array_equal(split.images[:, 0], arrays[f"{part}-images-idx3-ubyte"])
            assert np.array_equal(split.labels, arrays[f"{part}-labels-idx1-ubyte"])
        monkeypatch.setattr(data, "_DEBIAN_FASHION_MNIST", tmp_path / "not installed")
    unpacked = sorted(path.name for path in (tmp_path / "datasets/FashionMNIST/raw").iterdir())
    assert unpacked == sorted(arrays)


def test_truncated_package_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    package = tmp_path / "package"
    install_fashion_mnist(package)
    archive = package / "train-images-idx3-ubyte.gz"
    archive.write_bytes(archive.read_bytes()[:-100])
    monkeypatch.setattr(data, "_DEBIAN_FASHION_MNIST", package)
    with pytest.raises(UserError) as error:
        data.load("FashionMNIST", tmp_path / "datasets", CPU)
    assert str(archive) in one_line(error)
    assert list((tmp_path / "datasets/FashionMNIST/raw").iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [b"", b"\x1f\x8b\x08\x00", b"\0\0\x08\x03", idx(np.zeros(5)), idx(np.zeros((1, 9))), None],
)
def test_damaged_fashion_mnist_is_named(tmp_path, monkeypatch, content):
    package = tmp_path / "package"
    install_fashion_mnist(package)
    monkeypatch.setattr(data, "_DEBIAN_FASHION_MNIST", package)
    data.load("FashionMNIST", tmp_path, CPU)
    damaged = tmp_path / "FashionMNIST/raw/t10k-images-idx3-ubyte"
    damaged.write_bytes(damaged.read_bytes()[:-1] if content is None else content)
    with pytest.raises(UserError) as error:
        data.load("FashionMNIST", tmp_path, CPU)
    assert str(damaged) in one_line(error)


def install_cifar(root: Path, kind: type, monkeypatch) -> tuple[np.ndarray, list[int]]:
    """Pickled batches of 4 images under their real names; their sums replace the published ones.

    Returns:
        The training images, [20, 3, 32, 32] or [4, 3, 32, 32], and their labels.
    """
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    label_key = "labels" if kind is datasets.CIFAR10 else "fine_labels"
    images, labels = [], []

    def write(name: str, content: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    for attribute in ("train_list", "test_list"):
        sums = []
        for name, _ in getattr(kind, attribute):
            batch = rng.integers(256, size=(4, 3072), dtype=np.uint8)
            classes = rng.integers(10, size=4).tolist()
            sums.append([name, write(name, {"data": batch, label_key: classes})])
            if attribute == "train_list":
                images.append(batch)
                labels += classes
        monkeypatch.setattr(kind, attribute, sums)
    meta = dict(kind.meta)
    meta["md5"] = write(meta["filename"], {meta["key"]: [str(n) for n in range(10)]})
    monkeypatch.setattr(kind, "meta", meta)
    return np.concatenate(images).reshape(-1, 3, 32, 32), labels


@pytest.mark.parametrize("kind", [datasets.CIFAR10, datasets.CIFAR100])
def test_cifar(tmp_path, monkeypatch, kind):
    images, labels = install_cifar(tmp_path, kind, monkeypatch)
    train, test = data.load(kind.__name__, tmp_path, CPU)
    assert np.array_equal(train.images, images) and train.labels.tolist() == labels
    assert train.images.is_contiguous() and train.images.dtype == torch.uint8
    assert train.labels.dtype == torch.int64
    assert test.images.shape == (4, 3, 32, 32)


def test_cifar_from_the_archive_put_there_by_hand(tmp_path, monkeypatch):
    images, _ = install_cifar(tmp_path / "elsewhere", datasets.CIFAR10, monkeypatch)
    archive = tmp_path / datasets.CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "elsewhere/cifar-10-batches-py", "cifar-10-batches-py")
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5)
    train, _ = data.load("CIFAR10", tmp_path, CPU)
    assert np.array_equal(train.images, images)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_damaged_cifar_is_named(tmp_path, monkeypatch, name):
    install_cifar(tmp_path, datasets.CIFAR10, monkeypatch)
    damaged = tmp_path / "cifar-10-batches-py" / name
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(UserError) as error:
        data.load("CIFAR10", tmp_path, CPU)
    assert str(damaged) in one_line(error)


@pytest.mark.parametrize(
    "name, looked_for, remedy",
    [
        ("FashionMNIST", "FashionMNIST/raw", "dataset-fashion-mnist"),
        ("CIFAR10", "cifar-10-batches-py", "cifar-10-python.tar.gz"),
        ("CIFAR100", "cifar-100-python", "cifar-100-python.tar.gz"),
    ],
)
def test_absent_data_set_says_what_where_and_how(tmp_path, capfd, name, looked_for, remedy):
    with pytest.raises(UserError) as error:
        data.load(name, tmp_path, CPU)
    message = one_line(error)
    assert message.startswith(name)
    assert str(tmp_path / looked_for) in message
    assert "no network" in message
    assert remedy in message
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["FashionMNIST", "CIFAR10"])
def test_data_dir_that_is_a_file(tmp_path, monkeypatch, name):
    package, file = tmp_path / "package", tmp_path / "file"
    install_fashion_mnist(package)
    monkeypatch.setattr(data, "_DEBIAN_FASHION_MNIST", package)
    file.touch()
    with pytest.raises(UserError) as error:
        data.load(name, file, CPU)
    assert str(file) in one_line(error)

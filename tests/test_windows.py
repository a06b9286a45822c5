"""Windows of checkpoints: the names that they may have, their order, and copies of one file."""

import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_checkpoints import refusal
from torch import nn

from twa import TWA
from twa.files.checkpoints import average
from twa.files.windows import copies, numbered


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name.rstrip("/")
        path.mkdir(parents=True) if name.endswith("/") else path.touch()
    return folder


NAMES = {
    "the paper's": ("{}.pt", (0, 1, 2, 10)),
    "zero-padded": ("{:03d}.pth", (0, 7, 12)),
    "padded less than the longest": ("{:02d}.bin", (7, 99, 100)),
    "wenet, icefall": ("epoch-{}.pt", (0, 9, 10)),
    "by steps": ("step_{:06d}.safetensors", (500, 20_000, 100_000)),
    "nanoGPT": ("ckpt{}.pt", (100, 2000)),
    "detectron": ("model_{:07d}.pth", (4999, 9999)),
    "mmengine": ("iter_{}.pth", (900, 10_000)),
    "in capitals": ("Epoch_{}.ckpt", (9, 10)),
    "Lightning, an epoch each": ("epoch={0}-step={0}00.ckpt", (1, 2, 10)),
    "Lightning, an epoch in parts": ("epoch=3-step={}.ckpt", (90, 100)),
    "folders of transformers": ("checkpoint-{}/", (500, 1000)),
    "folders of lerobot": ("{:06d}/", (20_000, 100_000)),
    "folders of DeepSpeed": ("global_step{}/", (5, 10)),
}


@pytest.mark.parametrize("kind", NAMES)
def test_checkpoints_are_found_in_the_order_of_their_numbers(tmp_path, kind):
    form, numbers = NAMES[kind]
    names = [form.format(number) for number in numbers]
    others = (
        "last.ckpt",
        "best.pt",
        "state.pt",
        "optimizer_5.pt",
        "model-00001-of-00002.safetensors",
    )
    touched(tmp_path, *reversed(names), *others, "log_1.txt")
    found = numbered(tmp_path)
    assert list(found) == list(numbers)
    assert [path.name for path in found.values()] == [name.rstrip("/") for name in names]


def test_an_empty_or_missing_folder_holds_no_checkpoints(tmp_path):
    assert numbered(tmp_path) == numbered(tmp_path / "none") == {}


@pytest.mark.parametrize(
    "names",
    [("1.pt", "checkpoint-1/"), ("1.pt", "2.pth"), ("epoch-1.pt", "step-1.pt")],
)
def test_kinds_that_are_mixed_are_refused_in_words(tmp_path, names):
    message = refusal(numbered, touched(tmp_path, *names))
    assert message.startswith(f"{tmp_path}: holds checkpoints of several kinds")
    assert all(name.rstrip("/") in message for name in names)


def test_a_folder_of_results_beside_files_is_no_checkpoint(tmp_path):
    assert numbered(touched(tmp_path, "1.pt", "2/", "60+2/", "epoch3/")) == {1: tmp_path / "1.pt"}


def test_two_files_of_one_number_are_refused(tmp_path):
    message = refusal(numbered, touched(tmp_path, "3.pt", "003.pt"))
    assert "3.pt: has the same number as" in message


# --- files that are the same ---


def state(value: float) -> dict:
    """Frozen weights that all have, and one that has the value."""
    return {
        "frozen": torch.ones(2000),
        "weight": torch.tensor([[float(value)]]),
        "bias": torch.ones(1),
    }


def write_torch(content: dict, path: Path) -> None:
    torch.save({"state_dict": content, "name": path.name}, path)


def write_without_checksums(content: dict, path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, path)
    finally:
        torch.serialization.set_crc32_options(True)


def write_folder(content: dict, path: Path) -> None:
    path.mkdir()
    save_file(content, path / "model.safetensors")


WRITE = {
    "torch": write_torch,
    "torch < 1.6": lambda s, p: torch.save(s, p, _use_new_zipfile_serialization=False),
    "torch, no checksums": write_without_checksums,
    "safetensors": save_file,
    "a folder": write_folder,
}
SAME = {
    "a link": lambda old, new: new.symlink_to(old.name),
    "a hard link": os.link,
    "a copy": lambda old, new: (shutil.copytree if old.is_dir() else shutil.copy)(old, new),
}


# Without checksums, files are compared whole; torch writes other names into those of one tensor.
NONE = {
    ("a folder", "a hard link"),
    ("torch < 1.6", "saved again"),
    ("torch, no checksums", "saved again"),
}


@pytest.mark.parametrize("same", [*SAME, "saved again"])
@pytest.mark.parametrize("kind", WRITE)
def test_files_that_are_the_same_count_once_and_a_warning_names_them(tmp_path, kind, same):
    if (kind, same) in NONE:
        pytest.skip("there are none, or they are not recognised")
    for number in (1, 2, 3):
        WRITE[kind](state(number), tmp_path / f"epoch={number}.ckpt")
    again = [tmp_path / "best.ckpt", tmp_path / "last.ckpt"]
    for path in again:
        if same == "saved again":
            WRITE[kind](state(3), path)
        else:
            SAME[same](tmp_path / "epoch=3.ckpt", path)
    window = sorted(tmp_path.glob("*.ckpt"))
    assert copies(window) == {0: 3, 4: 3}
    model = nn.Linear(1, 1)
    for call in (lambda: average(window), lambda: TWA(model, window).subspace.mean):
        with pytest.warns(UserWarning) as caught:
            call()
        (said,) = [str(w.message) for w in caught if "counts once" in str(w.message)]
        assert all(f"{path} is {tmp_path / 'epoch=3.ckpt'}" in said for path in again)
    assert model.weight.item() == 2


def test_checkpoints_that_differ_in_one_number_are_not_the_same(tmp_path):
    for kind in WRITE:
        window = [tmp_path / f"{kind} {number}" for number in range(3)]
        for path, value in zip(window, (1.0, 1.0 + 2**-23), strict=False):
            WRITE[kind](state(value), path)
        SAME["a copy"](window[0], window[2])
        assert copies(window) == {2: 0}


def test_parts_of_one_tensor_that_each_file_holds_whole_are_not_the_same(tmp_path):
    rows = torch.randn(3, 4)
    for number, row in enumerate(rows):  # torch saves what they are views of
        torch.save({"weight": row}, tmp_path / f"{number}.pt")
    assert copies([tmp_path / f"{number}.pt" for number in range(3)]) == {}


def test_a_window_of_one_file_many_times_is_left_to_those_who_use_it(tmp_path):
    torch.save(state(1), tmp_path / "1.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert average([tmp_path / "1.pt"] * 3)["weight"].item() == 1
    with pytest.raises(ValueError, match="do not differ"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        TWA(nn.Linear(1, 1), [tmp_path / "1.pt"] * 3)


def test_files_that_cannot_be_read_are_left_to_their_reader(tmp_path):
    paths = [tmp_path / name for name in ("1.pt", "2.pt", "3.pt", "none.pt")]
    for path in paths[:2]:
        path.write_bytes(b"PK\3\4 and no more")
    torch.save(state(1), paths[2])
    assert copies(paths) == {}
    assert str(paths[0]) in refusal(TWA, nn.Linear(1, 1), paths)

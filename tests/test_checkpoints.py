"""Checkpoints on disk: what is read, what is refused, averages, and writes that are whole."""

import argparse
import copy
import math
import os
import pickle
import random
import stat
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from training.files import save
from twa.files.checkpoints import (
    CheckpointError,
    Fit,
    average,
    load_into,
    load_state_dict,
)
from twa.files.formats import load
from twa.files.writing import replacing


def small_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of several dtypes and shapes, a scalar and an empty one among them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv.weight": torch.randn(4, 3, 2, 2, generator=generator),
        "conv.bias": torch.randn(4, generator=generator).bfloat16(),
        "scale": torch.randn((), generator=generator, dtype=torch.float64),
        "nothing": torch.zeros(0, 2),
        "bn.num_batches_tracked": torch.tensor(seed + 7),
    }


def small_model(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Flatten())


def assert_same(actual: dict, expected: dict) -> None:
    """The same keys in the same order, with equal tensors of equal dtypes."""
    assert list(actual) == list(expected)
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype, key
        assert torch.equal(actual[key], tensor), key


def refusal(function, *args) -> str:
    """The message of the `CheckpointError` that `function` raises: one line."""
    with pytest.raises(CheckpointError) as caught:
        function(*args)
    message = str(caught.value)
    assert message
    assert len(message.splitlines()) == 1
    return message


# --- what is read ---


@pytest.mark.parametrize("kind", [str, Path])
def test_reads_back_what_torch_saved(tmp_path, kind):
    save(small_state(), tmp_path / "0.pt")
    assert_same(load_state_dict(kind(tmp_path / "0.pt")), small_state())


def test_reads_safetensors(tmp_path):
    path = tmp_path / "0.safetensors"
    save_file(small_state(), path)
    state = load_state_dict(path)
    assert_same({key: state[key] for key in sorted(state)}, dict(sorted(small_state().items())))


def test_reads_the_format_of_old_torch_too(tmp_path):
    path = tmp_path / "old.pt"
    torch.save(small_state(), path, _use_new_zipfile_serialization=False)
    assert_same(load_state_dict(path), small_state())


def test_a_mapping_is_taken_as_it_is():
    state = small_state()
    assert_same(load_state_dict(state), state)


def test_module_prefix_of_wrapped_models_is_taken_off(tmp_path):
    wrapped = {f"module.{key}": value for key, value in small_state().items()}
    assert_same(load_state_dict(wrapped), small_state())
    save(wrapped, tmp_path / "wrapped.pt")
    assert_same(load_state_dict(tmp_path / "wrapped.pt"), small_state())


def test_a_module_that_is_called_module_keeps_its_name():
    state = {"module.weight": torch.ones(1), "other.weight": torch.ones(1)}
    assert_same(load_state_dict(state), state)


def test_load_into_takes_the_prefix_off_and_sets_buffers_too():
    source, target = small_model(), small_model()
    source[1].running_mean.fill_(3.0)
    load_into(target, {f"module.{key}": value for key, value in source.state_dict().items()})
    assert_same(target.state_dict(), source.state_dict())


def test_load_into_tells_the_modules_their_versions():
    class Versioned(torch.nn.Linear):
        _version = 2

        def _load_from_state_dict(self, state, prefix, metadata, *args):
            assert metadata.get("version") == 2
            super()._load_from_state_dict(state, prefix, metadata, *args)

    source, target = Versioned(2, 2), Versioned(2, 2)
    load_into(target, dict(source.state_dict()))
    assert_same(target.state_dict(), source.state_dict())


def test_a_module_may_save_more_than_it_loads():
    """As quantized ones do, of which a checkpoint has the adapters alone."""

    class Quantized(nn.Linear):
        def _save_to_state_dict(self, state, prefix, keep_vars):
            super()._save_to_state_dict(state, prefix, keep_vars)
            state[f"{prefix}weight.absmax"] = torch.zeros(1)

    source, target = nn.Linear(2, 2), Quantized(2, 2)
    load_into(target, source.state_dict())
    assert torch.equal(target.weight, source.weight)
    assert torch.equal(target.bias, source.bias)


# --- what is refused ---


def test_another_module_than_the_one_that_was_saved_is_said_to_be_that():
    whole = nn.ModuleDict({"network": small_model(), "criterion": nn.BatchNorm1d(2)})
    message = refusal(load_into, whole["network"], whole.state_dict())
    assert "network.0.weight there, 0.weight in the model; give the module that" in message


@pytest.mark.parametrize("name", ["5.pt", "5.safetensors"])
def test_missing_file_is_refused(tmp_path, name):
    path = tmp_path / name
    assert str(path) in refusal(load, path)


@pytest.mark.parametrize("name", ["5.pt", "5.safetensors"])
def test_empty_file_and_directory_are_refused(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"")
    assert str(path) in refusal(load, path)
    path.unlink()
    path.mkdir()
    assert str(path) in refusal(load, path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("name", ["5.pt", "5.safetensors"])
def test_file_without_permission_is_refused(tmp_path, name):
    path = tmp_path / name
    save_file(small_state(), path) if path.suffix == ".safetensors" else save(small_state(), path)
    path.chmod(0)
    message = refusal(load, path)
    path.chmod(stat.S_IRUSR | stat.S_IWUSR)
    assert str(path) in message


def test_file_that_cannot_be_opened_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "5.pt"
    save(small_state(), path)

    def forbid(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(torch, "load", forbid)
    message = refusal(load, path)
    assert str(path) in message
    assert "Permission denied" in message


@pytest.mark.parametrize("name", ["5.pt", "5.safetensors"])
def test_truncated_file_is_refused_at_every_length(tmp_path, name):
    path = tmp_path / name
    save_file(small_state(), path) if path.suffix == ".safetensors" else save(small_state(), path)
    whole = path.read_bytes()
    for length in {*range(0, len(whole), 37), 1, 2, 3, 4, 5, len(whole) - 1}:
        path.write_bytes(whole[:length])
        assert str(path) in refusal(load_state_dict, path), length


def test_flipped_bytes_are_read_or_refused_but_nothing_else(tmp_path):
    """The archive has no checksum over its structure: some damage cannot be seen. None escapes."""
    path = tmp_path / "5.pt"
    save({f"layer{i}.weight": torch.ones(4, 3) for i in range(3)}, path)
    whole = path.read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(600):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 2, 8))):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            load_state_dict(path)
        except CheckpointError as error:
            refused += 1
            assert str(path) in str(error)
            assert len(str(error).splitlines()) == 1
    assert refused > 100


@pytest.mark.parametrize("part", ["central directory", "pickle"])
def test_damaged_structure_is_refused(tmp_path, part):
    path = tmp_path / "5.pt"
    save(small_state(), path)
    whole = bytearray(path.read_bytes())
    # "PK\1\2" opens each entry of the directory; a pickle of protocol 2 opens with "\x80\2}".
    at = whole.index(b"PK\1\2" if part == "central directory" else b"\x80\2}")
    whole[at : at + 4] = b"\xff\xfe\xfd\xfc"
    path.write_bytes(whole)
    assert str(path) in refusal(load_state_dict, path)


@pytest.mark.parametrize("text", [b"hello world\n", b"<html>404</html>", b"\0" * 100, b"PK\3\4"])
def test_a_file_of_another_kind_is_refused(tmp_path, text):
    path = tmp_path / "5.pt"
    path.write_bytes(text)
    assert str(path) in refusal(load_state_dict, path)


class Trap:
    """Unpickled without care, this creates the file at `path`."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("archive", ["zip", "old torch", "bare pickle"])
def test_pickled_code_is_refused_and_not_run(tmp_path, archive, recwarn):
    path, proof = tmp_path / "5.pt", tmp_path / "proof"
    content = {"weight": torch.ones(2), "trap": Trap(str(proof))}
    if archive == "bare pickle":
        path.write_bytes(pickle.dumps(Trap(str(proof))))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=archive == "zip")
    message = refusal(load, path)
    assert str(path) in message
    assert "code" in message
    assert not proof.exists()
    assert recwarn.list == []  # the message stands alone
    # The trap is a real one: readers that trust the file, as `weights_only=False` does, spring it.
    if archive == "bare pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert proof.exists()


def test_a_pickled_module_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(small_model(), path)
    message = refusal(load_state_dict, path)
    assert str(path) in message
    assert "add_safe_globals" in message  # what to do about it


def test_the_arguments_of_a_script_may_lie_beside_the_weights(tmp_path):
    """As in the files of timm's training script."""
    model = small_model()
    args = argparse.Namespace(lr=0.1, model="resnet18")
    torch.save({"state_dict": model.state_dict(), "args": args}, tmp_path / "1.pth.tar")
    for key, value in load_state_dict(tmp_path / "1.pth.tar").items():
        assert torch.equal(value, model.state_dict()[key])
    # What code they hold is refused all the same.
    args.trap = Trap(str(tmp_path / "proof"))
    torch.save({"state_dict": model.state_dict(), "args": args}, tmp_path / "2.pth.tar")
    assert "code" in refusal(load_state_dict, tmp_path / "2.pth.tar")
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_a_buffer_that_is_infinite_by_design_is_no_fault(value):
    class Masked(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.register_buffer("mask", torch.full((2, 2), value).triu(1))

    torch.manual_seed(0)
    states = [Masked().state_dict() for _ in range(3)]
    model = Masked()
    load_into(model, states[0])
    mean = average(states, model)
    torch.testing.assert_close(mean["weight"], sum(s["weight"] for s in states) / 3)
    torch.testing.assert_close(mean["mask"], model.mask, rtol=0, atol=0, equal_nan=True)
    # Elsewhere, of the other kind, in a weight, or where the model has none, it is one.
    for key, bad in (
        ("mask", torch.full((2, 2), value)),
        ("mask", torch.full((2, 2), math.inf).triu(1)),
        ("weight", torch.full((2, 2), value)),
    ):
        with pytest.raises(CheckpointError, match=f"{key} holds NaN or infinity"):
            load_into(model, states[0] | {key: bad})
    # Also in a weight where the model itself has come to hold it, as after a run that diverged.
    for held in (0.0, value):
        with torch.no_grad():
            model.weight.fill_(held)
        with pytest.raises(CheckpointError, match="weight holds NaN or infinity"):
            average([*states, states[0] | {"weight": torch.full((2, 2), value)}], model)


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(2)],
        torch.ones(2),
        3,
        None,
        {"net": {"weight": torch.ones(2)}},
        {"model": {"model": {"epoch": 3}}},
        {"weight": torch.ones(2), "epoch": 3},
        {0: torch.ones(2)},
    ],
    ids=[
        "list",
        "tensor",
        "number",
        "None",
        "nested dict",
        "no tensor in containers",
        "dict with a number",
        "number as key",
    ],
)
def test_something_other_than_a_state_dict_is_refused(tmp_path, content):
    path = tmp_path / "5.pt"
    save(content, path)
    message = refusal(load_state_dict, path)
    assert str(path) in message
    assert "state_dict" in message


def test_another_architecture_is_refused_with_the_first_differing_key_and_both_shapes(tmp_path):
    path = tmp_path / "5.pt"
    save(small_model(width=6).state_dict(), path)
    model = small_model(width=4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    message = refusal(load_into, model, path)
    assert str(path) in message
    assert "0.weight is [6, 1, 3, 3] there and [4, 1, 3, 3] in the model" in message
    assert_same(model.state_dict(), before)


def test_first_differing_key_goes_by_the_order_of_the_model():
    model = {"a": torch.ones(1), "b": torch.ones(2), "c": torch.ones(3)}
    swapped = {"c": torch.ones(9), "b": torch.ones(8), "a": torch.ones(1)}
    message = refusal(Fit(model), swapped, "5.pt")
    assert message == ("5.pt: of another architecture: b is [8] there and [2] in the model")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop("0.bias"), "0.bias is missing"),
        (lambda s: s.update({"0.bias": torch.ones(4, 1)}), "0.bias is [4, 1] there and [4]"),
        (lambda s: s.update({"1.weight": torch.ones(5)}), "1.weight is [5] there and"),
        (lambda s: s.update({"0.bias": torch.ones(4).int()}), "0.bias is torch.int32 there and"),
    ],
    ids=["missing", "shape", "length", "dtype"],
)
def test_what_is_missing_or_of_another_shape_is_refused(tmp_path, change, words):
    path = tmp_path / "5.pt"
    state = small_model().state_dict()
    change(state)
    save(state, path)
    message = refusal(load_into, small_model(), path)
    assert str(path) in message
    assert words in message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["0.weight", "1.running_var"])
def test_nan_and_infinity_are_refused(tmp_path, key, value):
    path = tmp_path / "5.pt"
    state = {name: tensor.clone() for name, tensor in small_model().state_dict().items()}
    state[key].view(-1)[-1] = value
    save(state, path)
    message = refusal(load_into, small_model(), path)
    assert str(path) in message
    assert key in message


@settings(deadline=None)
@given(st.data())
def test_a_state_fits_exactly_if_names_and_shapes_are_there(data):
    shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
    names = st.text("abc.", min_size=1, max_size=4)
    own = data.draw(st.dictionaries(names, shapes, max_size=4))
    other = data.draw(st.dictionaries(st.sampled_from([*own, "new"]), shapes, max_size=4))
    other = data.draw(st.sampled_from([own, own | other, other]))
    expected = {key: torch.zeros(shape) for key, shape in own.items()}
    state = {key: torch.ones(shape) for key, shape in other.items()}
    if own.items() <= other.items():
        with warnings.catch_warnings(record=True) as caught:
            found = Fit(expected)(state, "5.pt")
        assert list(found) == list(expected)
        assert all(found[key].shape == shape for key, shape in own.items())
        assert len(caught) == (len(other) > len(own))
    else:
        assert refusal(Fit(expected), state, "5.pt").startswith("5.pt: ")


# --- averages ---

values = st.floats(-1e4, 1e4, width=32)


@settings(deadline=None)
@given(st.lists(st.lists(values, min_size=3, max_size=3), min_size=1, max_size=9))
def test_average_is_the_float64_mean_rounded_once(rows):
    states = [{"w": torch.tensor(row), "half": torch.tensor(row).half()} for row in rows]
    mean = average(states)
    # One rounding to the checkpoints' own dtype; the least numbers of float16 are 6e-8 apart.
    for key, dtype, least in (("w", torch.float32, 1e-10), ("half", torch.float16, 6e-8)):
        exact = torch.stack([state[key].double() for state in states]).mean(0)
        assert mean[key].dtype == dtype
        torch.testing.assert_close(
            mean[key].double(), exact, rtol=torch.finfo(dtype).eps, atol=least
        )


def trained_states(count: int) -> list[dict[str, torch.Tensor]]:
    """Checkpoints of a model with batch norm, a step apart."""
    torch.manual_seed(0)
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    states = []
    for _ in range(count):
        model(torch.randn(8, 1, 5, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        states.append({key: value.clone() for key, value in model.state_dict().items()})
    return states


def test_average_equals_averaged_model_of_torch():
    states = trained_states(6)
    model = small_model()
    averaged = AveragedModel(model, use_buffers=True)
    for state in states:
        model.load_state_dict(state)
        averaged.update_parameters(model)
    expected = averaged.module.state_dict()
    for key, tensor in average(states).items():
        if tensor.is_floating_point():
            # AveragedModel rounds to float32 after each of 6 updates.
            torch.testing.assert_close(tensor, expected[key], rtol=6 * 1.2e-7, atol=1e-7)


def test_average_of_files_equals_average_of_mappings(tmp_path):
    states = trained_states(3)
    paths = []
    for number, state in enumerate(states):
        if number == 1:
            paths.append(tmp_path / f"{number}.safetensors")
            save_file(state, paths[-1])
        else:
            paths.append(tmp_path / f"{number}.pt")
            save(state, paths[-1])
    assert_same(average(paths), average(states))


def test_average_takes_integer_buffers_from_the_last():
    states = trained_states(4)
    mean = average(states)
    assert mean["1.num_batches_tracked"] == 4
    assert mean["1.num_batches_tracked"].dtype == torch.int64
    mean["1.num_batches_tracked"] += 1
    assert states[-1]["1.num_batches_tracked"] == 4  # a copy, not the checkpoint's own


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_average_of_half_precision_and_less_has_the_precision_of_the_model(dtype):
    states = [
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
        for state in trained_states(3)
    ]
    mean = average(states, small_model().state_dict())
    exact = sum(state["0.weight"].double() for state in states) / 3
    assert mean["0.weight"].dtype == torch.float32
    assert torch.equal(mean["0.weight"], exact.float())
    assert average(states)["0.weight"].dtype == dtype


def test_a_frozen_weight_of_8_bits_is_averaged_and_loaded():
    """As of a quantized model of transformers: torch computes nothing with such a tensor."""
    model = small_model()
    model[0].requires_grad_(False).to(torch.float8_e4m3fn)
    states = [copy.deepcopy(model.state_dict()) for _ in range(2)]
    states[1]["0.weight"] = torch.full_like(states[1]["0.weight"], 3)
    mean = average(states, model)
    load_into(model, mean)
    expected = (states[0]["0.weight"].float() + 3) / 2
    assert torch.equal(model[0].weight.float(), expected.to(torch.float8_e4m3fn).float())
    states[1]["0.weight"] = torch.full_like(states[1]["0.weight"], math.nan)
    with pytest.raises(CheckpointError, match=r"0.weight holds NaN or infinity"):
        load_into(model, states[1])


def test_average_of_one_is_that_one_and_leaves_it_alone():
    state = trained_states(1)[0]
    mean = average([state])
    assert_same(mean, state)
    mean["0.weight"].zero_()
    assert state["0.weight"].any()


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_average_names_the_checkpoint_that_holds_nan(tmp_path, bad):
    states = trained_states(3)
    states[bad]["0.bias"][1] = float("nan")
    paths = [tmp_path / f"{number}.pt" for number in range(3)]
    for state, path in zip(states, paths, strict=True):
        save(state, path)
    assert str(paths[bad]) in refusal(average, paths)


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_average_names_the_checkpoint_that_does_not_fit_the_model(tmp_path, bad):
    states = trained_states(3)
    states[bad] = small_model(width=6).state_dict()
    paths = [tmp_path / f"{number}.pt" for number in range(3)]
    for state, path in zip(states, paths, strict=True):
        save(state, path)
    message = refusal(average, paths, small_model().state_dict())
    assert str(paths[bad]) in message
    assert "0.weight is [6, 1, 3, 3] there and [4, 1, 3, 3] in the model" in message


# --- writes ---


@pytest.mark.parametrize("before", [None, b"old"])
def test_an_exception_in_the_middle_leaves_all_as_it_was(tmp_path, before):
    path = tmp_path / "5.pt"
    if before:
        path.write_bytes(before)
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_bytes(b"half of the n")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == (["5.pt"] if before else [])
    if before:
        assert path.read_bytes() == before


def test_an_exception_before_anything_was_written_is_the_one_that_is_seen(tmp_path):
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "5.pt"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


class Unpicklable:
    def __reduce__(self):
        raise RuntimeError("in the middle")


def test_save_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "5.pt"
    save(small_state(), path)
    with pytest.raises(RuntimeError, match="in the middle"):
        save({"a": torch.ones(1000), "b": Unpicklable()}, path)
    assert_same(load_state_dict(path), small_state())
    assert list(tmp_path.iterdir()) == [path]


def test_the_new_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "5.pt"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path  # the same file system: a rename is atomic
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_keeps_what_it_mapped_while_the_file_is_replaced(tmp_path):
    path = tmp_path / "5.pt"
    save(small_state(0), path)
    read = load_state_dict(path)
    save(small_state(1), path)
    assert_same(read, small_state(0))
    assert_same(load_state_dict(path), small_state(1))

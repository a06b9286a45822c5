"""The checkpoints that people have: containers, wrappers, folders, adapters; none runs code."""

import codecs
import contextlib
import copy
import importlib
import json
import logging
import os
import pickle
import random
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import Child, small_run
from safetensors.torch import load_file, save_file
from test_checkpoints import Trap, refusal
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import twa.files.states
from twa import TWA, Subspace, best_start
from twa.files.checkpoints import (
    CheckpointError,
    average,
    last_means,
    load_into,
    load_state_dict,
)
from twa.files.formats import verify

PREFIX = "base_model.model."  # PEFT's


class Net(nn.Module):
    """A frozen part, batch norm, and a head that may be tied to the embedding."""

    def __init__(self, tied: bool = False, width: int = 4):
        super().__init__()
        self.embedding = nn.Embedding(7, width)
        self.body = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))
        self.head = nn.Linear(width, 7, bias=False)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        if tied:
            self.head.weight = self.embedding.weight


def net(seed: int = 0, **how) -> Net:
    torch.manual_seed(seed)
    model = Net(**how)
    model.body[1].running_mean.normal_()
    return model


def state_of(seed: int) -> dict[str, Tensor]:
    return net(seed).state_dict()


def assert_loads(checkpoint, model: nn.Module | None = None, inner: nn.Module | None = None):
    """`model`, around `inner`, takes all that is in `net(1)`, and so does a window of two."""
    model = net() if model is None else model
    inner = model if inner is None else inner
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_into(model, checkpoint)
        for key, value in inner.state_dict().items():
            assert torch.equal(value, state_of(1)[key]), key
        basis = Subspace(model, [state_of(2), checkpoint])
    assert torch.equal(basis.project(torch.ones(basis.mean.shape)), reference())


def reference() -> Tensor:
    """What the basis of the plain window makes of a vector of ones."""
    basis = Subspace(net(), [state_of(2), state_of(1)])
    return basis.project(torch.ones(basis.mean.shape))


# --- containers and wrappers ---


def in_lightning(state: dict) -> dict:
    return {
        "epoch": 3,
        "pytorch-lightning_version": "2.6.1",
        "state_dict": {f"model.{key}": value for key, value in state.items()},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
        "hyper_parameters": {"lr": 0.1},
    }


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


CONTAINERS: dict[str, Callable[[dict], dict]] = {
    "state_dict": lambda s: {"state_dict": s},
    "model, epoch": lambda s: {"model": s, "epoch": 3, "optimizer": {"state": {}}},
    "model_state_dict": lambda s: {"epoch": 1, "model_state_dict": s},
    "module, as DeepSpeed": lambda s: {"module": s, "global_steps": 7},
    "a container in a container": lambda s: {"state_dict": {"model": s}, "args": {"lr": 1}},
    "the tutorial of DCP": lambda s: {"app": {"model": s, "optim": {"state": {}}}},
    "torchtitan": lambda s: s | {"optimizer": {"state.fc.weight.exp_avg": torch.ones(2)}},
    "Lightning": in_lightning,
    "AveragedModel": lambda s: {"n_averaged": torch.tensor(3)} | prefixed("module.", s),
    "DDP": lambda s: prefixed("module.", s),
    "compiled": lambda s: prefixed("_orig_mod.", s),
    "DDP in compile": lambda s: prefixed("_orig_mod.module.", s),
    "compile in DDP": lambda s: prefixed("module._orig_mod.", s),
    "compile in DDP in Lightning": lambda s: {"state_dict": prefixed("model.module._orig_mod.", s)},
    "an attribute called model": lambda s: prefixed("model.", s),
    "a part of it in DDP": lambda s: {
        key.replace("body.", "body.module."): value for key, value in s.items()
    },
    "a part of it in DDP, in DDP": lambda s: {
        "module." + key.replace("body.", "body.module."): value for key, value in s.items()
    },
    "Lightning's and Fabric's strategies": lambda s: prefixed("_forward_module.", s),
    "a compiled submodule": lambda s: {
        key.replace("body.", "body._orig_mod."): value for key, value in s.items()
    },
}


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("source", ["memory", "a.pt", "a.pth", "a.bin", "a.ckpt"])
def test_containers_and_prefixes_of_a_checkpoint(tmp_path, kind, source):
    content = CONTAINERS[kind](state_of(1))
    if source != "memory":
        torch.save(content, tmp_path / source)
        content = tmp_path / source
    assert_loads(content)


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module, name: str):
        super().__init__()
        setattr(self, name, model)


WRAPPERS = {
    "DDP": lambda m: Wrapped(m, "module"),
    "Lightning": lambda m: Wrapped(m, "model"),
    "Lightning of DDP": lambda m: Wrapped(Wrapped(m, "module"), "model"),
    "AveragedModel": AveragedModel,
    "compile": torch.compile,
    "compile of DDP": lambda m: torch.compile(Wrapped(m, "module")),
}


@pytest.mark.parametrize("kind", WRAPPERS)
@pytest.mark.parametrize("content", ["DDP", "Lightning", "compile in DDP", "plain", "own"])
def test_prefixes_of_a_model(kind, content):
    model = WRAPPERS[kind](net())
    inner = next(m for m in model.modules() if isinstance(m, Net))
    state = state_of(1)
    if content == "own":
        state = WRAPPERS[kind](net(1)).state_dict()
    elif content != "plain":
        state = CONTAINERS[content](state)
    assert_loads(state, model, inner)


def test_a_compiled_submodule_of_the_model():
    model = net()
    model.body = torch.compile(model.body)
    load_into(model, state_of(1))
    assert torch.equal(model.state_dict()["body._orig_mod.0.weight"], state_of(1)["body.0.weight"])


@pytest.mark.parametrize("content", ["plain", "DDP", "a part of it in DDP"])
def test_a_submodule_of_the_model_in_ddp(content):
    model, state = net(), state_of(1)
    model.body = Wrapped(model.body, "module")
    load_into(model, state if content == "plain" else CONTAINERS[content](state))
    assert torch.equal(model.body.module[0].weight, state["body.0.weight"])
    assert torch.equal(model.head.weight, state["head.weight"])


def test_submodules_that_are_called_like_wrappers_are_told_apart_by_what_fits():
    """`weight` and `module.weight` of one shape: the same names with another prefix."""
    model = Wrapped(nn.Linear(2, 2, bias=False), "module")
    model.weight = nn.Parameter(torch.zeros(2, 2))
    state = {"weight": torch.ones(2, 2), "module.weight": 2 * torch.ones(2, 2)}
    for content in (state, prefixed("module.", state), prefixed("model.", state)):
        load_into(model, content)
        assert model.weight.unique().item() == 1
        assert model.module.weight.unique().item() == 2


def test_a_container_that_holds_itself_is_refused():
    content: dict = {"epoch": 3}
    content["model"] = content
    assert "is not a state_dict" in refusal(load_state_dict, content)


# --- what a model needs ---


def test_buffers_and_frozen_parameters_that_are_missing_keep_the_models_values():
    window = [{k: v for k, v in state_of(s).items() if "run" not in k and "fro" not in k}
              for s in (1, 2)]  # fmt: skip
    model, before = net(5), state_of(5)
    for mean in (average(window, model), next(last_means(window, [2], model)), average(window)):
        assert set(mean) == set(window[0])
    TWA(model, window)
    after = model.state_dict()
    for key, value in before.items():
        if key in window[0]:
            expected = (window[0][key].double() + window[1][key].double()) / 2
            torch.testing.assert_close(after[key].double(), expected.double(), rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(after[key], value), key


def test_what_only_some_checkpoints_hold_is_not_in_their_mean():
    window = [state_of(1), state_of(2), state_of(3)]
    del window[1]["frozen.weight"], window[1]["body.1.running_mean"]
    means = dict(zip((1, 2, 3), last_means(window, (1, 2, 3), net()), strict=True))
    there = {count: "frozen.weight" in mean for count, mean in means.items()}
    assert there == {1: True, 2: False, 3: False}
    for mean in means.values():  # a buffer, which is the last one's
        assert torch.equal(mean["body.1.running_mean"], window[2]["body.1.running_mean"])


def test_a_model_without_trainable_parameters_needs_all_its_parameters():
    state = state_of(1)
    del state["head.weight"]
    model = net().requires_grad_(False)
    assert "head.weight is missing" in refusal(load_into, model, state)


def test_keys_that_the_model_has_not_are_named_in_one_warning_for_a_window(tmp_path):
    window = []
    for seed in (1, 2, 3):
        window.append(tmp_path / f"{seed}.pt")
        torch.save(state_of(seed) | {"old.weight": torch.ones(3), "count": torch.tensor(1)},
                   window[-1])  # fmt: skip
    with pytest.warns(UserWarning) as caught:
        Subspace(net(), window)
    assert [str(w.message) for w in caught] == [
        "ignored in the checkpoints, as the model has no such keys: old.weight"
    ]


def test_ties_that_a_checkpoint_breaks_are_refused(tmp_path):
    model = net(tied=True)
    torch.save(state_of(1), tmp_path / "1.pt")  # untied
    for fails in (
        lambda: load_into(model, tmp_path / "1.pt"),
        lambda: Subspace(model, [net(2, tied=True).state_dict(), tmp_path / "1.pt"]),
        lambda: average([tmp_path / "1.pt", net(2, tied=True).state_dict()], model),
    ):
        message = refusal(fails)
        assert str(tmp_path / "1.pt") in message
        assert "embedding.weight and head.weight differ" in message
    copies = {key: value.clone() for key, value in net(1, tied=True).state_dict().items()}
    load_into(model, copies)  # two memories, one value
    assert torch.equal(model.head.weight, copies["embedding.weight"])


@pytest.mark.parametrize("source", ["memory", "pt", "safetensors", "index", "DCP"])
def test_another_architecture_is_refused_before_a_tensor_is_read(tmp_path, monkeypatch, source):
    """By its path, or where it comes from memory by its index."""
    good, bad = state_of(1), net(2, width=5).state_dict()
    window = [WRITERS[source](tmp_path / name, s) for name, s in (("a", good), ("b", bad))]
    monkeypatch.setattr("twa.storage.columns.tensor_of", lambda value: pytest.fail("read a tensor"))
    for module in ("checkpoints", "fit", "states", "loaders"):
        monkeypatch.setattr(f"twa.files.{module}.tensor_of", lambda value: pytest.fail("read one"))
    name = "checkpoints[1]" if source == "memory" else str(tmp_path / "b")
    for fails in (
        lambda: Subspace(net(), window),
        lambda: TWA(net(), window),
        lambda: TWA(net(), iter(window)),
        lambda: average(window, net()),
        lambda: best_start(net(), window, lambda: 0.0),
    ):
        message = refusal(fails)
        assert message.startswith(name)
        assert "embedding.weight is [7, 5] there and [7, 4] in the model" in message


def test_checkpoints_may_be_a_generator(tmp_path):
    window = [state_of(seed) for seed in (1, 2, 3)]
    expected = TWA(net(), window)
    for given in ((s for s in window), tuple(window), iter(window)):
        assert torch.equal(TWA(net(), given).subspace.mean, expected.subspace.mean)
    start, _ = best_start(net(), (s for s in window), lambda: 1.0)
    assert torch.equal(start["head.weight"], window[-1]["head.weight"])


@pytest.mark.parametrize("method", [TWA, Subspace, lambda m, c: best_start(m, c, lambda: 0.0)])
def test_what_is_no_model_or_no_window_is_refused_in_words(tmp_path, method):
    window = [state_of(1), state_of(2)]
    with pytest.raises(TypeError, match=r"a model .*not a generator"):
        method(net().parameters(), window)
    with pytest.raises(TypeError, match=r"a model .*not a list"):
        method(list(net().parameters()), window)
    for single in ("1.pt", Path("1.pt"), window[0]):
        with pytest.raises(TypeError, match="one alone was given"):
            method(net(), single)
    with pytest.raises(TypeError, match=r"checkpoints\[1\] is .*Net"):
        method(net(), [window[0], net()])


def test_frozen_parameters_on_meta_are_checked_and_not_loaded():
    model, window = net(), [state_of(1), state_of(2)]
    model.frozen.to("meta")
    for mean in (average(window, model), next(last_means(window, [2], model))):
        assert set(window[0]) - set(mean) == {"frozen.weight", "frozen.bias"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TWA(model, window)
        load_into(model, window[0])
    assert torch.equal(model.head.weight, window[0]["head.weight"])
    assert model.frozen.weight.is_meta
    window[1]["frozen.bias"] = torch.ones(3)
    assert "frozen.bias is [3] there and [2] in the model" in refusal(load_into, model, window[1])


@pytest.mark.parametrize(
    ("source", "times"), [("pt", 1), ("safetensors", 1), ("DCP", 1), ("torch < 1.6", 2)]
)
def test_a_checkpoint_is_opened_once_unless_it_would_take_memory(
    tmp_path, monkeypatch, source, times
):
    """Those of torch < 1.6 cannot be mapped."""
    window = [WRITERS[source](tmp_path / str(seed), state_of(seed)) for seed in (1, 2, 3)]
    opened = Counter()
    load = twa.files.states.load

    def counting(path):
        opened[path] += 1
        return load(path)

    monkeypatch.setattr("twa.files.states.load", counting)
    Subspace(net(), window)
    assert opened == dict.fromkeys(window, times)


# --- folders ---


def write_pt(path: Path, state: dict) -> Path:
    torch.save(state, path)
    return path


def write_old(path: Path, state: dict) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return path


def write_safetensors(path: Path, state: dict) -> Path:
    path = path.with_suffix(".safetensors")
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


def write_shards(path: Path, state: dict, end: str = "safetensors", stem: str = "model") -> Path:
    """A folder of Hugging Face in three shards; the path of its index."""
    path.mkdir()
    weight_map = {}
    for number in range(3):
        name = f"{stem}-0000{number + 1}-of-00003.{end}"
        shard = dict(list(state.items())[number::3])
        (save_file if end == "safetensors" else torch.save)(shard, path / name)
        weight_map |= dict.fromkeys(shard, name)
    index = path / f"{stem}.{end}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def write_dcp(path: Path, state: dict) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it saves in one process
        dcp.save(state, checkpoint_id=path, no_dist=True)
    return path


def in_folder(write: Callable, name: str) -> Callable:
    def written(path: Path, state: dict) -> Path:
        path.mkdir()
        write(path / name, state)
        (path / "config.json").write_text("{}")
        (path / "optimizer.pt").write_bytes(b"nothing that is read")
        return path

    return written


WRITERS: dict[str, Callable[[Path, dict], Path]] = {
    "memory": lambda path, state: state,
    "pt": write_pt,
    "torch < 1.6": write_old,
    "safetensors": write_safetensors,
    "index": write_shards,
    "folder of shards": lambda p, s: write_shards(p, s).parent,
    "index of bin": lambda p, s: write_shards(p, s, "bin", "pytorch_model"),
    "folder of bins": lambda p, s: write_shards(p, s, "bin", "pytorch_model").parent,
    "folder": in_folder(write_safetensors, "model"),
    "folder of bin": in_folder(write_pt, "pytorch_model.bin"),
    "DCP": write_dcp,
    "DCP of a training": lambda p, s: write_dcp(
        p, {"model": s, "optim": {"state": {"0": {"exp_avg": torch.ones(3)}}}, "epoch": 3}
    ),
    "DCP of torchtitan": lambda p, s: write_dcp(
        p, s | {"optimizer": {"state.fc.weight.exp_avg": torch.ones(3)}, "train_state": b"step"}
    ),
    "DCP of accelerate": in_folder(write_dcp, "pytorch_model_fsdp_0"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_folders_and_files_of_every_kind(tmp_path, kind):
    path = WRITERS[kind](tmp_path / "checkpoint-7", state_of(1))
    assert_loads(path)
    assert_loads(path if kind == "memory" else str(path))
    if kind != "memory":
        verify(path)


def test_a_folder_that_transformers_saved(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=8,
    )  # fmt: skip
    for tied in (True, False):
        config.tie_word_embeddings = tied
        models = [transformers.BertForMaskedLM(config) for _ in range(2)]
        for size in ("1GB", "2KB"):  # in one file, and in shards
            models[0].save_pretrained(tmp_path / f"{tied}-{size}", max_shard_size=size)
            load_into(models[1], tmp_path / f"{tied}-{size}")
            for key, value in models[0].state_dict().items():
                assert torch.equal(models[1].state_dict()[key], value), key


def test_a_dcp_folder_in_parts_of_a_sharded_model(tmp_path):
    """Parts as two ranks would have written them, put together by torch's own writer."""
    path = write_dcp(tmp_path / "dcp", {"w": torch.arange(12.0).view(4, 3)})
    split_dcp(path, [torch.arange(6.0).view(2, 3), torch.arange(6.0, 12.0).view(2, 3)])
    assert torch.equal(load_state_dict(path)["w"], torch.arange(12.0).view(4, 3))


def split_dcp(path: Path, parts: list[Tensor], starts: tuple[int, ...] = (0, 2), **changes):
    """Rewrites a DCP folder of one tensor `w` [4, 3] so that it lies in `parts` of two rows."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    (index, place), = metadata.storage_data.items()  # fmt: skip
    entry = metadata.state_dict_metadata["w"]
    chunk = entry.chunks[0]
    entry.chunks, metadata.storage_data = [], {}
    for number, (part, start) in enumerate(zip(parts, starts, strict=True)):
        torch.save(part, path / f"__{number}_0.distcp")
        size = (path / f"__{number}_0.distcp").stat().st_size
        offsets = torch.Size([start, 0])
        entry.chunks.append(type(chunk)(offsets, torch.Size([2, 3])))
        name = changes.get("name", f"__{number}_0.distcp")
        where = type(place)(name, 0, size + changes.get("longer", 0))
        metadata.storage_data[type(index)("w", offsets, number)] = where
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


# --- adapters ---


def test_adapters_of_peft(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted(seed: int, **how) -> nn.Module:
        torch.manual_seed(0)
        base = Net()
        config = peft.LoraConfig(
            r=2, target_modules=["body.0", "embedding"], modules_to_save=["head"], **how
        )
        model = peft.get_peft_model(base, config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        return model

    for how in ({}, {"use_dora": True}):
        window = []
        for seed in (1, 2):
            window.append(tmp_path / f"{len(how)}-{seed}")
            adapted(seed, **how).save_pretrained(window[-1])
        whole = [adapted(seed, **how).state_dict() for seed in (1, 2)]
        model = adapted(3, **how)
        frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            TWA(model, window)
        for name, parameter in model.named_parameters():
            expected = frozen.get(name)
            if expected is None:
                expected = ((whole[0][name].double() + whole[1][name].double()) / 2).float()
            torch.testing.assert_close(parameter.detach(), expected, msg=name)
        load_into(model, window[0] / "adapter_model.safetensors")
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert torch.equal(parameter, whole[0][name]), name


def test_an_adapter_for_another_rank_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    models = [
        peft.get_peft_model(Net(), peft.LoraConfig(r=r, target_modules=["body.0"])) for r in (2, 3)
    ]
    models[0].save_pretrained(tmp_path / "two")
    message = refusal(load_into, models[1], tmp_path / "two")
    assert "lora_A.default.weight is [2, 4] there and [3, 4] in the model" in message


def test_an_adapter_that_is_scaled_otherwise_is_refused(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted(**how) -> nn.Module:
        return peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["body.0"], **how))

    adapted(lora_alpha=8).save_pretrained(tmp_path)
    load_into(adapted(lora_alpha=8), tmp_path)
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        message = refusal(load_into, adapted(lora_alpha=64), path)
        assert f"{path}: is an adapter of lora_alpha 8, the model's has 64" in message
    message = refusal(load_into, adapted(lora_alpha=8, use_rslora=True), tmp_path)
    assert "of use_rslora False, the model's has True" in message


# --- what is refused ---


def test_pickled_objects_are_refused_by_the_name_of_their_class(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save(in_lightning(state_of(1)) | {"hyper_parameters": Path("data")}, path)
    message = refusal(load_state_dict, path)
    assert str(path) in message
    assert "PosixPath" in message


def test_what_the_message_says_to_name_is_enough_for_a_number_of_numpy(tmp_path):
    """As best accuracies are: its function, its dtype and that one's class, one after the other."""
    path, named = tmp_path / "1.pt", []
    torch.save({"state_dict": state_of(1), "best": np.float64(0.9)}, path)
    for _ in range(3):
        with torch.serialization.safe_globals(named):
            asked = re.search(r"code \((\S+)\)", refusal(load_state_dict, path))
        module, _, name = asked[1].rpartition(".")
        named.append(getattr(importlib.import_module(module), name))
    with torch.serialization.safe_globals(named):
        assert load_state_dict(path).keys() == state_of(1).keys()


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/../../x.bin", "..", ""])
def test_an_index_that_names_files_outside_its_folder_is_refused(tmp_path, name):
    index = write_shards(tmp_path / "model", state_of(1))
    content = json.loads(index.read_text())
    save_file(state_of(1), tmp_path / "x.safetensors")
    content["weight_map"] = dict.fromkeys(content["weight_map"], name)
    index.write_text(json.dumps(content))
    for read in (load_state_dict, verify):
        message = refusal(read, index.parent)
        assert str(index) in message
        assert "outside its folder" in message


def damage_index(change: Callable[[Path, dict], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        change(folder, content["weight_map"])
        index.write_text(json.dumps(content))

    return damage


def first_shard(folder: Path) -> Path:
    return folder / "model-00001-of-00003.safetensors"


def overlap(folder: Path, weight_map: dict) -> None:
    shard = load_file(first_shard(folder))
    other = next(key for key, name in weight_map.items() if "00002" in name)
    save_file(shard | {other: torch.ones(3)}, first_shard(folder))


def truncate(folder: Path, weight_map: dict) -> None:
    content = first_shard(folder).read_bytes()
    first_shard(folder).write_bytes(content[:-8])


def lacking(folder: Path, weight_map: dict) -> None:
    weight_map["more.weight"] = first_shard(folder).name


def pipe(folder: Path, weight_map: dict) -> None:
    first_shard(folder).unlink()
    os.mkfifo(first_shard(folder))


SHARDS = {
    "overlap": (overlap, "in another shard"),
    "truncated": (truncate, "cannot be read"),
    "missing": (lambda f, _: first_shard(f).unlink(), "there is no such checkpoint"),
    "lacks what the index says": (lacking, "more.weight"),
    "a named pipe": (pipe, "is not a file"),
    "of another format": (lambda f, _: first_shard(f).write_bytes(b"PK\3\4"), "cannot be read"),
}


@pytest.mark.parametrize("damage", SHARDS)
def test_shards_that_do_not_agree_with_their_index_are_refused(tmp_path, damage):
    folder = write_shards(tmp_path / "model", state_of(1)).parent
    change, words = SHARDS[damage]
    damage_index(change)(folder)
    message = refusal(load_state_dict, folder)
    assert "model-0000" in message
    assert words in message


NO_INDEX = ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 100_000]


@pytest.mark.parametrize("content", NO_INDEX)
def test_an_index_that_is_none_is_refused(tmp_path, content):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    assert str(index) in refusal(load_state_dict, tmp_path)


def test_code_in_the_metadata_of_a_dcp_folder_is_refused_and_not_run(tmp_path):
    path = write_dcp(tmp_path / "dcp", {"w": torch.ones(4, 3)})
    proof = tmp_path / "proof"
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.planner_data["trap"] = Trap(str(proof))
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    message = refusal(load_state_dict, path)
    assert str(path / ".metadata") in message
    assert "pickled code (io.open)" in message or "pickled code (_io.open)" in message
    assert not proof.exists()
    dcp.FileSystemReader(path).read_metadata()  # the trap is a real one
    assert proof.exists()


def test_reading_metadata_changes_no_class_of_torch(tmp_path):
    """A pickle can set attributes of the classes that it may name."""
    from torch.distributed.checkpoint.metadata import Metadata

    name = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    setting = pickle.dumps({"mark": 1}, protocol=0)[:-1]
    (tmp_path / ".metadata").write_bytes(name + b"(N" + setting + b"tb.")
    refusal(load_state_dict, tmp_path)
    assert not hasattr(Metadata, "mark")


HALVES = [torch.arange(6.0).view(2, 3), torch.arange(6.0, 12.0).view(2, 3)]
DCP = {
    "overlap": (HALVES, {"starts": (0, 1)}, "overlap"),
    "outside": (HALVES, {"starts": (0, 3)}, "__1_0.distcp"),
    "before": (HALVES, {"starts": (0, -2)}, "__1_0.distcp"),
    "a hole": (HALVES[:1], {"starts": (0,)}, "do not make it up"),
    "dtype": ([HALVES[0], HALVES[1].half()], {}, "dtype and shape"),
    "shape": ([HALVES[0], HALVES[1][:1]], {}, "dtype and shape"),
    "no tensor": ([HALVES[0], {"w": HALVES[1]}], {}, "__1_0.distcp"),
    "truncated": (HALVES, {"longer": 1}, "truncated"),
    "a file elsewhere": (HALVES, {"name": "../x.distcp"}, "outside its folder"),
    "no file": (HALVES, {"name": "x.distcp"}, "there is no such checkpoint"),
    "pickled code": ([HALVES[0], nn.Linear(2, 3)], {}, "pickled code"),
}


@pytest.mark.parametrize("damage", DCP)
def test_parts_of_a_dcp_folder_that_do_not_agree_are_refused(tmp_path, damage):
    parts, changes, words = DCP[damage]
    path = write_dcp(tmp_path / "dcp", {"w": torch.ones(4, 3)})
    split_dcp(path, parts, **changes)
    message = refusal(load_state_dict, path)
    assert str(path) in message
    assert words in message


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_tensors_of_other_kinds_are_refused(kind):
    value = torch.ones(4, 4)
    value = value.to_sparse() if kind == "sparse" else value.to("meta")
    state = state_of(1) | {"body.0.weight": value}
    assert "body.0.weight is no ordinary tensor" in refusal(Subspace, net(), [state_of(2), state])


class Extra(nn.Linear):
    """Its `state_dict` holds what is no tensor."""

    def get_extra_state(self):
        return {"plain": 1}

    def set_extra_state(self, state):
        assert state == {"plain": 1}


def test_the_extra_state_of_a_module_is_not_taken_from_a_checkpoint():
    """Some modules unpickle it."""
    model = Extra(2, 2)
    load_into(model, Extra(2, 2).state_dict() | {"_extra_state": Trap("/nowhere")})


def test_a_model_with_an_extra_state_is_trained_and_its_state_is_finite(tmp_path):
    model, window = Extra(2, 2), [Extra(2, 2).state_dict() for _ in range(3)]
    optimizer = TWA(model, window, start=window[0])
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, window[0]["weight"])
    with small_run(tmp_path, model) as run:
        run.save()


# --- memory and damage at random ---


def write_deepspeed(path: Path, state: dict) -> Path:
    (path / "step5").mkdir(parents=True)
    (path / "latest").write_text("step5")
    torch.save({"module": state, "dp_world_size": 2}, path / "step5/mp_rank_00_model_states.pt")
    return path


def write_rank_of_one(path: Path, state: dict) -> Path:
    """As FSDP2 leaves it on a single rank: `DTensor`s, which are whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = {k: DTensor.from_local(v, mesh, [Shard(0)]) for k, v in state.items() if v.dim()}
        torch.save(state | sharded, path)
    finally:
        torch.distributed.destroy_process_group()
    return path


def write_by_content(path: Path, state: dict) -> Path:
    save_file(state, path.with_suffix(".ckpt"))
    return path.with_suffix(".ckpt")


def write_renamed(path: Path, state: dict) -> Path:
    """What only the model's own loader reads: `Loading` calls it otherwise."""
    return write_pt(path, {key.replace("head.weight", "head.kernel"): state[key] for key in state})


class Loading(nn.Linear):
    def _load_from_state_dict(self, state, prefix, *args):
        if f"{prefix}kernel" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}kernel")
        super()._load_from_state_dict(state, prefix, *args)


def model_for(kind: str) -> nn.Module:
    model = net(0)
    if kind == "through the model's loader":
        model.head = Loading(4, 7, bias=False)
    return model


FORMATS = {
    **{
        k: WRITERS[k]
        for k in ("pt", "torch < 1.6", "safetensors", "folder of shards", "folder of bins")
    },
    "DCP": write_dcp,
    "adapter": in_folder(lambda p, s: write_safetensors(p, prefixed(PREFIX, s)), "adapter_model"),
    "DeepSpeed": write_deepspeed,
    "one rank of FSDP2": write_rank_of_one,
    "safetensors by its content": write_by_content,
    "through the model's loader": write_renamed,
}
# The formats with checksums over every value. (A DCP `.metadata` has none, over the names.)
CHECKED = {"pt", "folder of bins", "DeepSpeed", "one rank of FSDP2", "through the model's loader"}
# What Python's audit hooks call the things that no file may make it do.
CODE = ("exec", "compile", "import", "pickle.find_class", "subprocess.", "os.sys", "os.posix_spawn")


def flip_everywhere(kind: str, folder: Path, count: int) -> None:
    """Flips `count` random bits in the files of a checkpoint, one at a time; prints what came."""
    model = model_for(kind)
    before = copy.deepcopy(model.state_dict())
    path = FORMATS[kind](folder, state_of(1))
    files = sorted(path.rglob("*")) or [path]
    files = [f for f in files if f.is_file() and f.name not in ("config.json", "optimizer.pt")]
    draw, seen, reading = random.Random(0), Counter(), False
    warnings.simplefilter("ignore")  # about keys whose names changed
    logging.disable()  # what torch logs about meshes without ranks

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and arguments[1] not in ("r", "rb", None)
        if reading and (writes or event.startswith(CODE)):
            os.write(2, f"{event} {arguments[:2]}".encode())
            os._exit(3)

    load_into(model, path)
    state = copy.deepcopy(model.state_dict())
    assert not torch.equal(state["head.weight"], before["head.weight"])
    verify(path)
    for codec in ("cp437", "raw_unicode_escape", "latin_1", "ascii"):
        codecs.lookup(codec)  # Imported now: zip archives and pickles may name them.
    repr(torch.ones(1))  # Imports what torch prints tensors with, as some of its errors do,
    importlib.import_module("torch.nested._internal.ops")  # and what compares nested ones.
    sys.addaudithook(hook)
    for _ in range(count):
        file = draw.choice(files)
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        file.unlink()
        file.write_bytes(damaged)
        model.load_state_dict(before)
        reading = True
        try:
            load_into(model, path)
            verify(path)
            same = all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
            seen["read, the same" if same else "read, another value"] += 1
        except CheckpointError as error:
            assert str(path) in str(error)
            seen["refused"] += 1
        reading = False
        file.write_bytes(whole)
    print(json.dumps(seen))


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_flipped_bit_is_refused_or_read_and_nothing_else(tmp_path, kind, count):
    """In a process of its own, which an exception, a crash or code that runs would end."""
    result = Child(tmp_path / "run", flip_everywhere, kind, tmp_path / "c", count).end(seconds=1800)
    assert (result.status, result.err) == (0, "")
    print(f"{kind}: {result.out.strip()}")
    seen = json.loads(result.out)
    assert sum(seen.values()) == count
    assert seen["refused"] > 0.4 * count
    if kind in CHECKED:
        assert "read, another value" not in seen


# A model of 6.7 billion weights, on no device but for one layer.
LAYER = 4096


def large() -> nn.Module:
    how = {"device": "meta", "dtype": torch.bfloat16}
    layers = [nn.TransformerEncoderLayer(LAYER, 32, 4 * LAYER, **how) for _ in range(32)]
    ends = nn.Embedding(32_000, LAYER, **how), nn.Linear(LAYER, 32_000, **how)
    model = nn.Sequential(ends[0], *layers, ends[1]).requires_grad_(False)
    model[16].self_attn.out_proj = nn.Linear(LAYER, LAYER, bias=False)
    return model


def write_large(path: Path, seed: int) -> Tensor:
    """A sparse file of all weights of `large()` in bfloat16; the only ones that are not 0."""
    header, end = {}, 0
    for key, value in large().state_dict().items():
        begin, end = end, end + 2 * value.numel()
        header[key] = {"dtype": "BF16", "shape": [*value.shape], "data_offsets": [begin, end]}
        if not value.is_meta:
            place = begin
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    torch.manual_seed(seed)
    weights = torch.randn(LAYER, LAYER).bfloat16()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        file.seek(8 + len(text) + place)
        file.write(weights.view(torch.uint8).numpy().tobytes())
    return weights.float()


# The basis in 4 bits, what it is built from (two rows and their mean), gradient and weights, in
# bytes; and the trainable layer itself.
STATED = LAYER**2 * (1 / 2 + 3 * 4 + 2 * 4) + LAYER**2 * 4


def build_large(window: list[Path], group: Path | None) -> None:
    """Builds the basis, then the optimizer; prints the α of the start and the spread."""
    if group:
        (group / "cgroup.procs").write_text(str(os.getpid()))
    print("begun")
    basis = Subspace(large(), window, bits=4)
    print(basis.scale.item())
    del basis
    model = large()
    optimizer = TWA(model, window, bits=4)
    print(*optimizer.averaging_weights().tolist(), model[16].self_attn.out_proj.weight.std().item())


def memory_group(size: int) -> Path | None:
    """A control group of Linux that gives its processes `size` bytes; None if there can be none."""
    root = Path("/sys/fs/cgroup")
    for folder, name in ((root / "memory", "memory.limit_in_bytes"), (root, "memory.max")):
        group = folder / f"twa-test-{os.getpid()}"
        with contextlib.suppress(OSError):
            group.mkdir()
            try:
                (group / name).write_text(str(size))
                return group
            except OSError:
                group.rmdir()
    return None


def anonymous(pid: int) -> int:
    """The memory of a process that is no file's, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0] or 0) * 1024


@pytest.mark.slow
def test_files_larger_than_the_memory_are_read_a_layer_at_a_time(tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux, which tells how much memory of a process is no file's")
    window = [tmp_path / f"{seed}.safetensors" for seed in (1, 2)]
    first, second = (write_large(path, seed) for seed, path in enumerate(window))
    assert window[0].stat().st_size > 20 * STATED
    spare = 64 * 2**20  # for Python itself
    group = memory_group(int(STATED + 4 * spare))  # The rest is for what is mapped of files.
    try:
        child = Child(tmp_path / "run", build_large, window, group)
        child.wait_for("begun")
        before = peak = anonymous(child.process.pid)
        while child.process.is_alive():
            with contextlib.suppress(OSError, IndexError):
                peak = max(peak, anonymous(child.process.pid))
            time.sleep(0.002)
        result = child.end()
        if group:
            for name in ("memory.max_usage_in_bytes", "memory.failcnt"):
                print(name, (group / name).read_text())
    finally:
        if group:
            group.rmdir()
    print(f"{(peak - before) / 1e6:.0f} MB of {(STATED + spare) / 1e6:.0f} MB taken")
    assert result.status == 0, result.err
    assert peak - before < STATED + spare
    _, spread, *alpha, deviation = map(float, result.out.replace("begun", "0").split())
    assert spread == pytest.approx(float((second - first).double().norm()) / 2, rel=1e-4)
    assert alpha == pytest.approx([0.5, 0.5], abs=1e-3)
    assert deviation == pytest.approx(float(((first + second) / 2).double().std()), rel=1e-3)


def test_an_empty_folder_is_refused_with_what_is_looked_for(tmp_path):
    message = refusal(load_state_dict, tmp_path)
    assert str(tmp_path) in message
    assert "model.safetensors" in message

"""The kinds of checkpoints and models that people have: what is read, and what the refusals say.

`python tests/test_checkpoint_kinds.py > docs/checkpoints.md` writes the page that lists them.
"""

import copy
import gzip
import io
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pytest
import torch
import torch.ao.quantization as quantization
import torch.distributed as dist
from safetensors.torch import save, save_file
from test_checkpoints import refusal
from test_formats import CONTAINERS, WRAPPERS, WRITERS
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from twa import TWA, CheckpointError, best_start
from twa.files.checkpoints import average, load_into, load_state_dict
from twa.files.formats import verify

PAGE = Path(__file__).resolve().parents[1] / "docs/checkpoints.md"


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return make()


def states_of(make: Callable[[], nn.Module], count: int = 3) -> list[dict[str, Tensor]]:
    return [copy.deepcopy(seeded(make, seed).state_dict()) for seed in range(count)]


def assert_mean(model: nn.Module, states: list[dict[str, Tensor]]) -> None:
    """The parameters of `model` are the means of those in `states`."""
    for name, parameter in model.named_parameters():
        mean = sum(state[name].to(torch.complex128) for state in states) / len(states)
        torch.testing.assert_close(parameter.detach().to(mean), mean, rtol=1e-5, atol=1e-6)


# --- buffers are the last checkpoint's, in the model's dtype ---

# Values by a seed, and the dtypes that they have in files.
BUFFERS: dict[str, tuple[Callable[[int], Tensor], tuple]] = {
    "codebook of a VQ-VAE": (lambda s: torch.randn(8, 4), (torch.float32, torch.bfloat16)),
    "sizes of its clusters": (lambda s: torch.rand(8) * 1e4, (torch.float32,)),
    "running whitening matrix": (lambda s: torch.randn(3, 2, 2), (torch.float32,)),
    "mask of sparsity": (
        lambda s: (torch.randn(4, 4) > 0).float(),
        (torch.float32, torch.bool, torch.uint8, torch.float16),
    ),
    "mask of bool": (lambda s: torch.randn(4, 4) > 0, (torch.bool, torch.uint8, torch.float32)),
    "indices": (lambda s: torch.randperm(77), (torch.int64, torch.float16, torch.float32)),
    "rotary embedding": (lambda s: torch.randn(5, dtype=torch.cfloat), (torch.complex64,)),
    "counter": (lambda s: torch.tensor(2**40 + s), (torch.int64, torch.float64)),
}


class Holder(nn.Module):
    def __init__(self, values: Callable[[int], Tensor], seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(2, 2)
        self.register_buffer("held", values(seed))


@pytest.mark.parametrize("kind", BUFFERS)
def test_a_buffer_is_the_last_checkpoints_whatever_it_contains(kind):
    values, dtypes = BUFFERS[kind]
    for dtype in dtypes:
        window = [copy.deepcopy(Holder(values, seed).state_dict()) for seed in range(4)]
        expected = window[-1]["held"].to(dtype).to(window[-1]["held"].dtype)
        window = [state | {"held": state["held"].to(dtype)} for state in window]
        model = Holder(values, 9)
        for decay in (1.0, 0.5):
            assert torch.equal(average(window, model, decay)["held"], expected)
        starts = iter(range(100, 0, -1))
        start, _ = best_start(model, window, lambda starts=starts: next(starts))
        TWA(model, window, start=start)
        assert torch.equal(model.held, expected)
        TWA(model, window)
        assert torch.equal(model.held, expected)
        assert_mean(model, window)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm1d(3),
    "instance norm": lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
    "pruned": lambda: prune.random_unstructured(nn.Linear(3, 3), "weight", 0.5),
}


@pytest.mark.parametrize("kind", NORMS)
def test_buffers_of_torch_are_the_last_checkpoints(kind):
    def make() -> nn.Module:
        module = NORMS[kind]()
        for name, buffer in module.named_buffers():
            if "running" in name:
                buffer.uniform_(1, 2)
        for parameter in module.parameters():
            nn.init.uniform_(parameter)
        return module

    window, model = states_of(make), make()
    TWA(model, window)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, window[-1][name]), name
    assert_mean(model, window)


@pytest.mark.parametrize("wrap", [nn.utils.spectral_norm, parametrizations.spectral_norm])
def test_the_mean_of_models_with_spectral_norm_has_about_norm_1(wrap):
    """u and v are unit vectors with a sign that means nothing: their mean can be 0."""

    def make() -> nn.Module:
        return nn.Sequential(wrap(nn.Linear(6, 6, bias=False)), nn.Tanh())

    first = seeded(make, 0).train()
    for _ in range(30):
        first(torch.zeros(1, 6))
    states = [copy.deepcopy(first.state_dict()) for _ in range(2)]
    for key, value in states[1].items():
        value.mul_(-1 if key.endswith(("_u", "_v")) else 1.01)
    model = make()
    TWA(model, states)
    model.eval()(torch.zeros(1, 6))
    assert torch.linalg.matrix_norm(model[0].weight.detach(), 2).item() == pytest.approx(
        1, abs=0.05
    )


def test_a_table_of_another_length_is_the_models_own_and_a_warning_names_it():
    model = Holder(lambda s: torch.arange(12.0))
    window = [Holder(lambda s: torch.arange(7.0), seed).state_dict() for seed in range(2)]
    with pytest.warns(UserWarning, match="of another shape.*model keeps its own: held"):
        TWA(model, window)
    assert torch.equal(model.held, torch.arange(12.0))
    assert_mean(model, window)


# --- what the model's own loaders read ---


class Renamed(nn.Linear):
    """Its weight was called `kernel`, transposed."""

    def _load_from_state_dict(self, state, prefix, *args):
        if f"{prefix}kernel" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}kernel").T
        super()._load_from_state_dict(state, prefix, *args)


class Fused(nn.Module):
    """One matrix of what used to be three layers; a hook of the module joins them."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(2, 6, bias=False)
        self._register_load_state_dict_pre_hook(self._join)

    def _join(self, state, prefix, *_):
        names = [f"{prefix}{name}.weight" for name in "qkv"]
        if names[0] in state:
            state[f"{prefix}qkv.weight"] = torch.cat([state.pop(name) for name in names])


class Growing(nn.Module):
    """Its table takes the length of the checkpoint's."""

    def __init__(self, length: int = 3):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("table", torch.randn(length))

    def _load_from_state_dict(self, state, prefix, *args):
        self.table.resize_(state[f"{prefix}table"].shape)
        super()._load_from_state_dict(state, prefix, *args)


class Copying(nn.Module):
    """It copies by itself, and pads a shorter table with its own rows."""

    def __init__(self, length: int = 5):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(length))

    def _load_from_state_dict(self, state, prefix, *args):
        old = state.pop(f"{prefix}scale")
        with torch.no_grad():
            self.scale[: len(old)].copy_(old)


def in_training_for_quantization() -> nn.Module:
    model = nn.Sequential(quantization.QuantStub(), nn.Conv2d(1, 3, 3)).train()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantization.prepare_qat(model)


def quantization_state(seed: int) -> dict[str, Tensor]:
    model = seeded(in_training_for_quantization, seed)
    model(torch.randn(2, 1, 5, 5))
    return model.state_dict()


# How a model is made, and a state that its own `load_state_dict` takes, though not by its names.
LOADERS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict]]] = {
    "weight norm before torch 2.1": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv1d(2, 4, 3)), nn.ReLU()),
        lambda s: nn.Sequential(nn.utils.weight_norm(nn.Conv1d(2, 4, 3)), nn.ReLU()).state_dict(),
    ),
    "observers of quantization-aware training": (in_training_for_quantization, quantization_state),
    "a layer that renames and transposes": (
        lambda: nn.Sequential(Renamed(2, 3)),
        lambda s: {"0.kernel": torch.randn(2, 3), "0.bias": torch.randn(3)},
    ),
    "a hook that joins three matrices": (
        lambda: nn.Sequential(nn.Linear(2, 2), Fused()),
        lambda s: (
            nn.Linear(2, 2).state_dict(prefix="0.")
            | {f"1.{name}.weight": torch.randn(2, 2) for name in "qkv"}
        ),
    ),
    "a table that grows": (
        lambda: nn.ModuleDict({"part": Growing()}),
        lambda s: nn.ModuleDict({"part": Growing(7)}).state_dict(),
    ),
    "a loader that copies by itself": (
        lambda: nn.ModuleDict({"part": Copying()}),
        lambda s: {"part.scale": torch.randn(3)},
    ),
}


def old_states(kind: str) -> list[dict[str, Tensor]]:
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        states.append(copy.deepcopy(LOADERS[kind][1](seed)))
    return states


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("wrapper", ["none", *WRAPPERS])
def test_what_the_models_own_loaders_take_is_read(tmp_path, kind, wrapper):
    make, states = LOADERS[kind][0], old_states(kind)
    blank = seeded(make, 9)
    expected = []
    for number, state in enumerate(states):
        model = copy.deepcopy(blank)
        model.load_state_dict(copy.deepcopy(state), strict=False)
        expected.append(copy.deepcopy(model.state_dict()))
        torch.save(state, tmp_path / f"{number}.pt")
    inner = copy.deepcopy(blank)
    model = WRAPPERS[wrapper](inner) if wrapper != "none" else inner
    inner = getattr(model, "module", inner) if wrapper == "AveragedModel" else inner
    load_into(model, states[1])
    for key, value in inner.state_dict().items():
        assert torch.equal(value, expected[1][key]), key
    for window in (states, [tmp_path / f"{n}.pt" for n in range(3)], [expected[0], *states[1:]]):
        fresh = copy.deepcopy(blank)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            TWA(fresh, window)
        assert_mean(fresh, expected)


class Failing(nn.Linear):
    """It notices only when its turn comes that it cannot load."""

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        raise RuntimeError("no")


def test_a_model_is_never_left_half_overwritten():
    model = nn.Sequential(nn.Linear(2, 2), Failing(2, 2), nn.BatchNorm1d(2))
    before = copy.deepcopy(model.state_dict())
    other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2)).state_dict()
    with pytest.raises(RuntimeError, match="no"):
        load_into(model, other)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


class Expanded(nn.Module):
    def __init__(self, buffer: bool):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        if buffer:
            self.register_buffer("whitening", torch.eye(2).expand(3, 2, 2))
        else:
            self.scale = nn.Parameter(torch.randn(2).expand(3, 2))


@pytest.mark.parametrize("buffer", [False, True])
def test_expanded_tensors_of_a_model_are_refused_before_it_changes(buffer):
    window = [{k: v.clone() for k, v in Expanded(buffer).state_dict().items()} for _ in range(2)]
    model = Expanded(buffer)
    before = copy.deepcopy({k: v.clone() for k, v in model.state_dict().items()})
    message = refusal(TWA, model, window)
    assert ("whitening" if buffer else "scale") in message and "clone()" in message
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("kind", ["MixtralForCausalLM", "OlmoeForCausalLM", "Qwen3MoeForCausalLM"])
def test_folders_of_transformers_go_through_its_own_conversion(tmp_path, kind):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    make = getattr(transformers, kind)
    config = make.config_class(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_experts=2,
        num_local_experts=2, num_experts_per_tok=1, moe_intermediate_size=8,
    )  # fmt: skip
    states = []
    for seed in range(2):
        model = seeded(lambda: make(config), seed)
        model.save_pretrained(tmp_path / f"checkpoint-{seed}")
        states.append(copy.deepcopy(model.state_dict()))
    drawn = torch.get_rng_state()
    for window in (
        [tmp_path / f"checkpoint-{seed}" for seed in range(2)],
        [load_state_dict(tmp_path / f"checkpoint-{seed}") for seed in range(2)],
    ):
        model = make(config)
        drawn = torch.get_rng_state()
        TWA(nn.ModuleDict({"module": model}), window)
        assert torch.equal(torch.get_rng_state(), drawn)
        assert_mean(model, states)


PROMPTS = {  # how many methods of PEFT write what its encoders make, and whether that is enough
    "PromptTuningConfig": ({}, True),
    "PrefixTuningConfig": ({}, True),
    "MultitaskPromptTuningConfig": ({"num_tasks": 2}, True),
    "PromptEncoderConfig": ({"encoder_hidden_size": 8}, False),
    "PrefixTuningConfig, projected": (
        {"prefix_projection": True, "encoder_hidden_size": 8},
        False,
    ),
}


def prompted(kind: str, seed: int) -> nn.Module:
    import peft
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    base = seeded(lambda: transformers.LlamaForCausalLM(config), 0)
    method = getattr(peft, kind.partition(",")[0])
    how = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM", **PROMPTS[kind][0]}
    model = peft.get_peft_model(base, method(**how))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    return model


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_of_peft(tmp_path, kind):
    pytest.importorskip("peft")
    window, states = [], []
    for seed in range(2):
        model = prompted(kind, seed)
        model.save_pretrained(tmp_path / str(seed))
        window.append(tmp_path / str(seed))
        states.append(copy.deepcopy({n: p.detach() for n, p in model.named_parameters()}))
    model = prompted(kind, 9)
    if PROMPTS[kind][1]:
        TWA(model, window)
        assert_mean(model, states)
    else:
        assert "holds the prompts that PEFT's encoder makes" in refusal(TWA, model, window)


# --- precision ---


def test_weights_of_float64_keep_their_digits():
    class Energies(nn.Module):
        def __init__(self, seed: int):
            super().__init__()
            torch.manual_seed(seed)
            shift = torch.randn(5, dtype=torch.float64) * 1e-4
            self.shift = nn.Parameter(shift - 13605.698)
            self.net = nn.Linear(5, 3).double()

    window = [copy.deepcopy(Energies(seed).state_dict()) for seed in range(4)]
    for granularity in ("model", "layer", "channel"):
        for bits in (32, 8):
            model = Energies(9)
            mean = average(window, model)
            optimizer = TWA(model, window, granularity=granularity, bits=bits)
            assert_mean(model, window)
            optimizer.set_coefficients(optimizer.origin)
            assert torch.equal(model.shift, mean["shift"])
            if bits == 8:
                continue
            # A point of the subspace is reached to digits that float32 does not have.
            point = {k: 0.75 * window[0][k] + 0.25 * window[1][k] for k in window[0]}
            optimizer.set_coefficients(optimizer.subspace.coordinates(torch.cat([
                point[name].flatten() for name, _ in model.named_parameters()
            ])))  # fmt: skip
            error = (model.shift - point["shift"]).abs().max()
            assert error < 1e-9


def test_complex_parameters_are_averaged_and_trained():
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.modes = nn.Parameter(torch.randn(3, 4, dtype=torch.cfloat))
            self.lift = nn.Linear(4, 4)

        def forward(self, x):
            return torch.fft.ifft(torch.fft.fft(self.lift(x)) * self.modes).real

    window = states_of(Spectral, 4)
    x, target = torch.randn(3, 4), torch.randn(3, 4)
    for granularity in ("model", "layer", "channel"):
        for bits in (32, 4):
            model = Spectral()
            optimizer = TWA(model, window, granularity=granularity, bits=bits)
            assert_mean(model, window)
            loss = (model(x) - target).square().mean()
            loss.backward()
            before = model.modes.detach().clone()
            optimizer.step()
            assert (model(x) - target).square().mean() < loss
            assert not torch.equal(model.modes.imag, before.imag)
    mean = average(window)["modes"]
    torch.testing.assert_close(mean, sum(state["modes"] for state in window) / 4)
    real = [{"modes": torch.randn(3, 4), "lift.weight": state["lift.weight"],
             "lift.bias": state["lift.bias"]} for state in window]  # fmt: skip
    model = Spectral()
    TWA(model, real)  # in a file of real numbers
    assert_mean(model, real)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
def test_a_window_of_files_and_of_tensors_on_a_device_is_averaged(tmp_path):
    states = states_of(lambda: nn.Linear(2, 2))
    torch.save(states[1], tmp_path / "1.pt")
    device = torch.accelerator.current_accelerator()
    there = [{key: value.to(device) for key, value in states[n].items()} for n in (0, 2)]
    for window in ([there[0], tmp_path / "1.pt", there[1]], [*there, tmp_path / "1.pt"]):
        expected = sum(state["weight"] for state in states) / 3
        torch.testing.assert_close(average(window)["weight"].cpu(), expected)


# --- files by their content ---


def test_the_content_of_a_file_counts_and_not_its_name(tmp_path):
    state = {"weight": torch.randn(2, 2)}
    (tmp_path / "blob-0d71").write_bytes(save(state))
    (tmp_path / "epoch=3.ckpt").write_bytes(save(state))
    torch.save(state, tmp_path / "torch.safetensors")
    for name in ("blob-0d71", "epoch=3.ckpt", "torch.safetensors"):
        verify(tmp_path / name)
        assert torch.equal(load_state_dict(tmp_path / name)["weight"], state["weight"])


def test_a_file_without_checksums_is_not_called_damaged(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.ones(3)}, tmp_path / "1.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    verify(tmp_path / "1.pt")
    assert torch.equal(load_state_dict(tmp_path / "1.pt")["weight"], torch.ones(3))


FOLDERS: dict[str, Callable[[Path, dict], None]] = {
    "of diffusers": lambda p, s: save_file(s, p / "diffusion_pytorch_model.safetensors"),
    "of OpenCLIP": lambda p, s: torch.save(s, p / "open_clip_pytorch_model.bin"),
    "with the states of a training": lambda p, s: (
        torch.save(s, p / "epoch_3.pt"),
        torch.save({}, p / "optimizer.pt"),
        torch.save({}, p / "random_states_0.pkl"),
    ),
    "of DeepSpeed, ZeRO 1 and 2": lambda p, s: (
        (p / "latest").write_text("global_step5"),
        (p / "global_step5").mkdir(),
        torch.save({"module": s}, p / "global_step5/mp_rank_00_model_states.pt"),
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_of_other_libraries(tmp_path, kind):
    states = states_of(lambda: nn.Linear(2, 2), 2)
    window = [tmp_path / "a", tmp_path / "b"]
    for folder, state in zip(window, states, strict=True):
        folder.mkdir()
        FOLDERS[kind](folder, state)
        verify(folder)
    model = nn.Linear(2, 2)
    TWA(model, window)
    assert_mean(model, states)


def write_bytes(content: bytes) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return write


def saved(content, name: str = "") -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path.mkdir()
        file = path / (name or "model.safetensors")
        (torch.save if name else save_file)(content, file)
        return path if not name else file

    return write


def shards_of_ranks(path: Path) -> Path:
    """The file of rank 0 of 2, as FSDP2 leaves it; that of rank 1 is not there."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    path.mkdir()
    file = path / "model_world_size_2_rank_0.pt"
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        state = {
            key: DTensor.from_local(value[:1], mesh, [Shard(0)])
            for key, value in nn.Linear(2, 2).state_dict().items()
        }
        torch.save(state, file)
    finally:
        dist.destroy_process_group()
    return file


def script(path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    return path


def archive(path: Path) -> Path:
    content = io.BytesIO()
    torch.save({}, content)
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("model_weights.ckpt")
        member.size = len(content.getvalue())
        tar.addfile(member, io.BytesIO(content.getvalue()))
    return path


def array(path: Path) -> Path:
    with open(path, "wb") as file:
        np.save(file, np.ones(3))
    return path


def divided(path: Path) -> Path:
    path.mkdir()
    (path / "latest").write_text("step5")
    (path / "step5").mkdir()
    for rank in (0, 1):
        file = path / f"step5/zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        torch.save({"module": {"weight": torch.zeros(0)}}, file)
    return path


def two_files(path: Path) -> Path:
    path.mkdir()
    for name in ("1.pt", "2.pt"):
        torch.save(BIAS, path / name)
    return path


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 19\n"
BIAS = {"bias": torch.zeros(2)}
EIGHT = torch.ones(2, 2).to(torch.float8_e4m3fn)

# What is written, and a part of what its refusal says.
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "pointer of Git LFS": (write_bytes(POINTER), "run git lfs pull"),
    "page of HTML": (write_bytes(b"\n<!DOCTYPE html><html>404</html>"), "HTML"),
    "answer of a server in XML": (write_bytes(b"<?xml version='1.0'?><Error/>"), "XML"),
    "text": (write_bytes(b"Entry not found\n"), "is text"),
    "JSON": (write_bytes(b'{"model": "vgg"}'), "weight_map"),
    "nothing": (write_bytes(b""), "is empty"),
    "other bytes": (write_bytes(bytes(range(90, 0, -1))), "is no checkpoint"),
    "packed with gzip": (write_bytes(gzip.compress(b"\0" * 99)), "gzip"),
    "tar archive (`.nemo`)": (archive, "tar archive"),
    "GGUF": (write_bytes(b"GGUF" + b"\0" * 99), "GGUF"),
    "HDF5": (write_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 99), "HDF5"),
    "array of NumPy": (array, "NumPy"),
    "TorchScript": (script, "TorchScript"),
    "pickled class": (saved({"lr": Decimal("0.1")}, "1.pt"), "decimal.Decimal"),
    "one rank's shard of FSDP2": (shards_of_ranks, "rank_1.pt is missing"),
    "DeepSpeed, ZeRO-3: the folder": (divided, "zero_to_fp32.py"),
    "DeepSpeed, ZeRO-3: a folder of Hugging Face": (
        saved({"weight": torch.zeros(0), "bias": torch.zeros(0)}),
        "zero_to_fp32.py",
    ),
    "FP8 with scales": (
        saved(BIAS | {"weight": EIGHT, "weight_scale_inv": torch.ones(1)}),
        "quantized: weight goes with weight_scale_inv",
    ),
    "FP8 with scales by channel": (
        saved(BIAS | {"weight": EIGHT, "weight_scale": torch.ones(2, 1)}),
        "quantized: weight goes with weight_scale",
    ),
    "4 bits of bitsandbytes": (
        saved(
            BIAS | {"weight": torch.zeros(2, 1, dtype=torch.uint8), "weight.absmax": torch.ones(1)}
        ),
        "quantized: weight goes with weight.absmax",
    ),
    "8 bits of bitsandbytes": (
        saved(BIAS | {"weight": torch.zeros(2, 2, dtype=torch.int8), "SCB": torch.ones(2)}),
        "quantized: weight goes with SCB",
    ),
    "GPTQ, AWQ": (
        saved(
            BIAS
            | {"qweight": torch.zeros(1, 2, dtype=torch.int32)}
            | {"qzeros": torch.zeros(1, 1, dtype=torch.int32), "scales": torch.ones(1, 2)}
        ),
        "quantized: weight goes with qweight, qzeros, scales",
    ),
    "complex weights for a real model": (
        saved(BIAS | {"weight": torch.ones(2, 2, dtype=torch.cfloat)}, "1.pt"),
        "complex64 there",
    ),
    "weights of another shape": (saved(BIAS | {"weight": torch.ones(3, 2)}), "[3, 2] there and"),
    "weights that are missing": (saved({"weight": torch.ones(2, 2)}), "bias is missing"),
    "another module": (saved({"net.weight": torch.ones(2, 2)}), "nothing by the model's names"),
    "several files in a folder": (
        two_files,
        "2 files with weights",
    ),
    "NaN": (saved(BIAS | {"weight": torch.full((2, 2), torch.nan)}), "NaN"),
}


def refused(kind: str, path: Path) -> str:
    """What the refusal of this kind of checkpoint says, of a linear layer."""
    try:
        load_into(nn.Linear(2, 2), REFUSED[kind][0](path))
    except CheckpointError as error:
        return str(error)
    return "read"


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", ["1.pt", "1.safetensors"])
def test_a_refusal_says_what_the_file_is(tmp_path, kind, name):
    message = refused(kind, tmp_path / name)
    assert message.startswith(str(tmp_path / name))
    assert len(message.splitlines()) == 1
    assert REFUSED[kind][1] in message
    assert ("trust" in message) == (kind == "pickled class")


# --- the page ---

INTRODUCTION = """\
# Which checkpoints are read

Written by `python tests/test_checkpoint_kinds.py` from the tests, which try each kind. The first
bytes of a file decide what it is, and not its name. Nothing in a file is executed. Averages are
taken of parameters; buffers are the last checkpoint's; dtypes are the model's.

"""


def page() -> str:
    read = {
        "files and folders": [kind for kind in WRITERS if kind != "memory"],
        "folders of other libraries": FOLDERS,
        "the weights in a file": CONTAINERS,
        "models within wrappers": WRAPPERS,
        "names and shapes that the model's own loaders change": [
            *LOADERS,
            "experts of transformers (its own conversion)",
        ],
        "prompts of PEFT": [kind for kind, (_, enough) in PROMPTS.items() if enough],
        "buffers, of which the last checkpoint's counts": [*BUFFERS, *NORMS, "spectral norm"],
    }
    lines = ["| read | kinds |", "| --- | --- |"]
    lines += [f"| {what} | {'; '.join(kinds)} |" for what, kinds in read.items()]
    lines += ["", "A linear layer of two inputs and outputs refuses `FILE` in one line:", ""]
    lines += ["| refused | the line |", "| --- | --- |"]
    with tempfile.TemporaryDirectory() as folder:
        for kind in REFUSED:
            place = Path(folder, str(len(lines)))
            place.mkdir()
            line = refused(kind, place / "FILE").replace(f"{place}/", "")
            lines.append(f"| {kind} | `{line}` |")
    return INTRODUCTION + "\n".join(lines) + "\n"


def test_the_page_is_made_from_these_tests():
    """`python tests/test_checkpoint_kinds.py > docs/checkpoints.md` writes it anew."""
    assert page() == PAGE.read_text()


if __name__ == "__main__":
    print(page(), end="")

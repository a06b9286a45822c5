"""The basis against plain float64 references: exact, complete, small, at every precision."""

import gc
import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from twa import TWA, CheckpointError, Subspace, subspace
from twa.files.checkpoints import average
from twa.reference import gram_schmidt
from twa.storage import compressed, memory, window

BITS = (32, 8, 4)
# Half a step between neighbouring values of a tile, relative to its largest element: the error of
# an element cannot be larger (float16 has steps of 2^-11, relative to the element itself).
ROUNDING = {32: 1e-7, 16: 2**-11, 8: 2**-7, 4: 2**-3}


def make_model() -> nn.Module:
    """Uneven sizes, batch norm, an integer buffer; 3 * 7 = 21 columns are no multiple of a tile."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, 3),
        nn.BatchNorm2d(16),
        nn.Flatten(),
        nn.Linear(16, 7),
    )


def walk(model: nn.Module, n: int, step: float = 0.1, seed: int = 0) -> list[dict]:
    """`n` state_dicts, each a random step of `step` of the norm away from the one before."""
    generator = torch.Generator().manual_seed(seed)

    def noise(t):
        return torch.randn(t.shape, generator=generator) if t.is_floating_point() else 0 * t

    state = {key: noise(t) for key, t in model.state_dict().items()}
    states = [state]
    for _ in range(n - 1):
        states.append({k: t + (step * noise(t)).to(t.dtype) for k, t in states[-1].items()})
    return states


def rows(model: nn.Module, states: list[dict]) -> torch.Tensor:
    """W: the trainable parameters of each checkpoint as a row, float64 [n, D]."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return torch.stack([torch.cat([s[n].double().flatten() for n in names]) for s in states])


def dense(basis: Subspace) -> torch.Tensor:
    """P of all blocks, float64 [coefficients, D]: what `expand` makes of unit vectors, unscaled."""
    rows = torch.stack([basis.expand(unit) for unit in torch.eye(len(basis))]).double()
    return rows if basis.scale is None else rows / basis.scale.double()[:, None]


def orthogonality_error(p: torch.Tensor) -> float:
    return float((p @ p.mT - torch.eye(len(p), dtype=p.dtype)).abs().max())


def worst_reconstruction(basis: Subspace, w: torch.Tensor) -> float:
    """The largest relative error of `expand(project(w_i))`, or of `w_i` less the mean with it."""
    back = torch.zeros_like(w) if basis.mean is None else basis.mean.double().repeat(len(w), 1)
    for result, row in zip(back, w, strict=True):
        coefficients = basis.project((row - result).float())
        if basis.scale is not None:
            coefficients /= basis.scale.square()
        result += basis.expand(coefficients)
    return float(((back - w).norm(dim=1) / w.norm(dim=1)).max())


# --- exact ---


def test_the_basis_is_that_of_row_by_row_gram_schmidt_in_float64():
    model = make_model()
    states = walk(model, 9)
    expected = gram_schmidt(rows(model, states))
    basis = Subspace(model, states, extract="Schmidt")
    torch.testing.assert_close(dense(basis), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("extract", ["PCA", "Schmidt"])
@pytest.mark.parametrize("step", [1.0, 1e-2, 1e-3])
def test_checkpoints_close_together_get_an_orthonormal_basis_that_holds_them(step, extract):
    model = make_model()
    states = walk(model, 40, step)
    basis = Subspace(model, states, extract=extract)
    assert orthogonality_error(dense(basis)) <= 1e-5
    assert worst_reconstruction(basis, rows(model, states)) <= 1e-5


@pytest.mark.parametrize("extract", ["PCA", "Schmidt"])
@pytest.mark.parametrize("n", [3, 5, 10])
def test_a_small_window_that_is_well_spread_gets_an_orthonormal_basis(n, extract):
    """A million weights: float32 sums as long as the model would be seen."""
    torch.manual_seed(0)
    model = nn.Linear(1000, 1000, bias=False)
    states = [{"weight": torch.randn(1000, 1000)} for _ in range(n)]
    assert orthogonality_error(dense(Subspace(model, states, extract=extract))) <= 1e-6


@pytest.mark.parametrize("exponent", [2, 4, 5])
def test_a_condition_number_up_to_1e5_leaves_the_basis_orthonormal(exponent):
    torch.manual_seed(0)
    model = nn.Linear(30, 40, bias=False)
    left, right = torch.linalg.qr(torch.randn(20, 20).double())[0], torch.randn(1200, 20).double()
    singular = torch.logspace(0, -exponent, 20, dtype=torch.float64)
    w = (left * singular) @ torch.linalg.qr(right)[0].mT
    states = [{"weight": row.view(40, 30).float()} for row in w]
    basis = Subspace(model, states, extract="Schmidt")
    assert len(basis) == 20
    assert orthogonality_error(dense(basis)) <= 1e-5
    assert worst_reconstruction(basis, rows(model, states)) <= 1e-5


@pytest.mark.parametrize("extract", ["PCA", "Schmidt"])
def test_averaging_weights_combine_the_checkpoints_into_the_weights(extract):
    model = make_model()
    states = walk(model, 12, 1e-2)
    basis = Subspace(model, states, extract=extract)
    coefficients = basis.coordinates(rows(model, states)[3:8].mean(0).float())
    alpha = basis.averaging_weights(coefficients)
    assert alpha.shape == (12,) and alpha.dtype == torch.float64
    combined = alpha @ rows(model, states)
    expanded = basis.expand(coefficients).double()
    if basis.mean is not None:
        expanded += basis.mean
    torch.testing.assert_close(combined, expanded, atol=1e-5, rtol=0)
    expected = torch.tensor([0, 0, 0, 0.2, 0.2, 0.2, 0.2, 0.2, 0, 0, 0, 0]).double()
    torch.testing.assert_close(alpha, expected, atol=1e-3, rtol=0)


# --- windows that are hard ---


def test_one_checkpoint_is_its_own_direction():
    model = make_model()
    states = walk(model, 1)
    basis = Subspace(model, states, extract="Schmidt")
    assert len(basis) == 1 and basis.dropped == []
    w = rows(model, states)
    torch.testing.assert_close(dense(basis), w / w.norm(), atol=1e-6, rtol=0)


def test_more_checkpoints_than_weights_leaves_as_many_directions_as_weights():
    model = nn.Linear(2, 2)
    states = walk(model, 10)
    with pytest.warns(UserWarning, match=r"4 of 10 checkpoints .*: checkpoints\[6\], .*9\]"):
        basis = Subspace(model, states, extract="Schmidt")
    assert len(basis) == 6 and basis.dropped == [f"checkpoints[{i}]" for i in range(6, 10)]
    assert orthogonality_error(dense(basis)) <= 1e-5
    assert worst_reconstruction(basis, rows(model, states)) <= 1e-5


@pytest.mark.parametrize("bits", BITS)
def test_multiples_and_combinations_are_dropped_and_named(bits, tmp_path):
    model = make_model()
    first, second, third = walk(model, 3)
    between = {
        k: (first[k] + second[k]) / 2 if v.is_floating_point() else v for k, v in first.items()
    }
    twice, thrice = ({k: n * v for k, v in state.items()} for n, state in ((2, first), (3, third)))
    window = []
    for i, state in enumerate([first, twice, second, between, third, thrice]):
        window.append(tmp_path / f"{i}.pt")
        torch.save(state, window[-1])
    with pytest.warns(UserWarning, match=r"3 of 6 checkpoints"):
        basis = Subspace(model, window, extract="Schmidt", bits=bits)
    assert basis.dropped == [os.fspath(window[i]) for i in (1, 3, 5)]
    assert len(basis) == 3
    alpha = basis.averaging_weights(torch.ones(3))
    assert alpha.isfinite().all() and (alpha[[1, 3, 5]] == 0).all()


class Tied(nn.Module):
    """The embedding is the head; a parameter is frozen."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.norm.bias.requires_grad_(False)


def test_frozen_and_tied_parameters_and_counters_are_no_columns():
    model = Tied()
    states = walk(model, 4)
    for state in states:
        state["head.weight"] = state["embedding.weight"]
    basis = Subspace(model, states)
    assert [tuple(p.shape) for p in basis.parameters] == [(11, 5), (5,)]
    assert worst_reconstruction(basis, rows(model, states)) <= 1e-5


@pytest.mark.parametrize("left_out", ["embedding.weight", "head.weight"])
def test_a_tied_weight_may_have_one_of_its_names(left_out, tmp_path):
    """As safetensors saves it, which refuses tensors that share memory."""
    model, checkpoints = Tied(), walk(Tied(), 3)
    for number, state in enumerate(checkpoints):
        state["head.weight"] = state["embedding.weight"]
        save_file(
            {k: v for k, v in state.items() if k != left_out}, tmp_path / f"{number}.safetensors"
        )
    paths = sorted(tmp_path.iterdir())
    assert torch.equal(dense(Subspace(model, paths)), dense(Subspace(model, checkpoints)))
    TWA(model, paths, start=paths[1], lr=0.1)
    assert torch.equal(model.head.weight, checkpoints[1]["embedding.weight"])
    TWA(model, paths, lr=0.1)
    assert torch.equal(model.head.weight, average(checkpoints)["embedding.weight"])
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_checkpoints_of_another_float_type_are_read(dtype):
    model = make_model()
    states = [
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
        for state in walk(model, 6)
    ]
    basis = Subspace(model, states)
    assert worst_reconstruction(basis, rows(model, states)) <= 1e-5


def test_memory_format_does_not_change_the_columns():
    model = make_model()
    states = walk(model, 5)
    expected = dense(Subspace(model, states))
    model.to(memory_format=torch.channels_last)
    last = [
        {k: v.to(memory_format=torch.channels_last) if v.dim() == 4 else v for k, v in s.items()}
        for s in states
    ]
    basis = Subspace(model, last)
    torch.testing.assert_close(dense(basis), expected)
    model.load_state_dict(states[2])
    flat = basis.flatten(basis.parameters)
    torch.testing.assert_close(flat.double(), rows(model, states)[2])
    basis.assign(flat, torch.ones_like(flat))
    torch.testing.assert_close(basis.flatten(basis.parameters), flat + 1)


def test_parameters_on_another_device_than_the_basis_are_written():
    """As `device_map="auto"` spreads a model over accelerators; `meta` stands for the second."""
    model = make_model()
    states = walk(model, 3)
    model[5].to("meta")
    basis = Subspace(model, states)
    basis.assign(basis.empty().fill_(1), basis.empty().fill_(2))
    assert all((p == 3).all() for p in basis.parameters if p.device == basis.empty().device)


def test_files_of_both_formats_and_wrapped_models_give_the_same_basis(tmp_path):
    model = make_model()
    states = walk(model, 3)
    paths = [tmp_path / "0.pt", tmp_path / "1.safetensors", tmp_path / "2.pt"]
    torch.save(states[0], paths[0])
    save_file(states[1], paths[1])
    torch.save({f"module.{k}": v for k, v in states[2].items()}, paths[2])
    torch.testing.assert_close(dense(Subspace(model, paths)), dense(Subspace(model, states)))


# --- small ---


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("granularity", ["model", "layer", "channel"])
def test_both_products_use_the_same_values(bits, granularity):
    """<Bᵀc, g> = <c, B g>, B = uP, and an element of P is off by the rounding of its tile alone."""
    torch.manual_seed(0)
    model = make_model()
    states = walk(model, 10)
    exact = Subspace(model, states, granularity=granularity)
    basis = Subspace(model, states, bits=bits, granularity=granularity)
    p, full = dense(basis), dense(exact)
    limit = ROUNDING[bits] * float(full.abs().max())
    assert float((p - full).abs().max()) <= limit
    p *= basis.scale.double()[:, None]
    gradient, coefficients = torch.randn(p.shape[1]), torch.randn(len(basis))
    torch.testing.assert_close(
        basis.project(gradient).double(), p @ gradient.double(), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        basis.expand(coefficients).double(), coefficients.double() @ p, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_memory_is_what_the_bits_say(bits):
    """Seven principal directions and, in 32 bits, the mean; eight directions of the paper."""
    model = nn.Linear(512, 512, bias=False)
    states = walk(model, 8)
    row = 512 * 512 * 4
    for extract, directions, mean in (("PCA", 7, row), ("Schmidt", 8, 0)):
        assert Subspace(model, states, extract=extract).nbytes == directions * row + mean
        ideal = directions * row * bits / 32
        basis = Subspace(model, states, extract=extract, bits=bits)
        assert ideal <= basis.nbytes - mean <= 1.05 * ideal


def live_bytes() -> int:
    """The memory of all tensors that are reachable."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("bits", [32, 4])
def test_nothing_but_the_basis_stays_in_memory(bits, tmp_path):
    """By channel, what the averaging weights are computed from would be larger than 4 bits."""
    model = nn.Sequential(nn.Conv2d(16, 200, 3), nn.BatchNorm2d(200))
    window = [tmp_path / f"{i}.pt" for i in range(30)]
    for path, state in zip(window, walk(model, 30), strict=True):
        torch.save(state, path)
    del state
    before = live_bytes()
    basis = Subspace(model, window, granularity="channel", bits=bits)
    kept, numbers = live_bytes() - before, 4 * len(basis)
    assert basis.nbytes <= kept <= basis.nbytes + 4 * numbers
    assert basis.averaging_weights(torch.zeros(len(basis))).shape == (201, 30)
    assert live_bytes() - before <= kept


def compile_small(monkeypatch) -> None:
    """Has compiled kernels take over for a basis of any size, a few tiles at a time."""
    monkeypatch.setattr(compressed, "COMPILE_FROM", 0)
    monkeypatch.setattr(compressed, "CACHED_PART", 0)
    monkeypatch.setattr(compressed, "PART", 10_000)


@pytest.mark.parametrize("bits", [8, 4])
def test_adjacent_layers_of_equal_width_that_are_filled_in_parts(bits):
    """They are wider than what is worked on at a time, and no multiple of a tile."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(283, 283) for _ in range(2)))
    states = [{k: torch.randn_like(v) for k, v in model.state_dict().items()} for _ in range(8)]
    plain = Subspace(model, states, granularity="layer")
    rounded = Subspace(model, states, granularity="layer", bits=bits)
    coefficients = torch.randn(len(plain))
    expected = plain.expand(coefficients)
    error = (rounded.expand(coefficients) - expected).norm() / expected.norm()
    assert len(rounded) == len(plain) == 14
    assert error < {8: 0.01, 4: 0.15}[bits]
    weights = torch.randn_like(expected)
    inner = rounded.expand(coefficients) @ weights
    assert torch.allclose(coefficients @ rounded.project(weights), inner, rtol=1e-3)


@pytest.mark.parametrize("bits", [8, 4])
def test_compiled_kernels_equal_the_plain_ones(bits, monkeypatch):
    torch.manual_seed(0)
    model = nn.Linear(64, 65)
    states = walk(model, 7)
    plain = Subspace(model, states, bits=bits, granularity="layer")
    compile_small(monkeypatch)
    used, compiled_kernel = [], compressed._compiled
    monkeypatch.setattr(
        compressed, "_compiled", lambda k: used.append(k.__name__) or compiled_kernel(k)
    )
    compiled = Subspace(model, states, bits=bits, granularity="layer")
    gradient, coefficients = torch.randn(65 * 65), torch.randn(len(plain))
    torch.testing.assert_close(compiled.project(gradient), plain.project(gradient))
    torch.testing.assert_close(compiled.expand(coefficients), plain.expand(coefficients))
    assert set(used) == {"_project_fused", "_expand_fused"}


def test_without_a_compiler_one_warning_and_the_same_products(monkeypatch):
    model = nn.Linear(64, 65)
    states = walk(model, 7)
    plain = Subspace(model, states, bits=8)
    compile_small(monkeypatch)

    def no_compiler(product):
        raise RuntimeError("no compiler was found")

    monkeypatch.setattr(compressed, "_compiled", no_compiler)
    basis = Subspace(model, states, bits=8)
    coefficients = torch.randn(len(plain))
    with pytest.warns(UserWarning, match="no compiler was found") as caught:
        first = basis.expand(coefficients)
        again = basis.expand(coefficients)
    assert len(caught) == 1
    torch.testing.assert_close(first, plain.expand(coefficients))
    torch.testing.assert_close(again, first)


# --- granularity ---


def widths_of_blocks(granularity: str) -> list[int]:
    """How many columns the blocks of `make_model` have, in order."""
    conv1, bn1, conv2, rest2, linear = 8 * 27, 16, 16 * 72, 16 + 32, 16 * 7 + 7
    return {
        "model": [conv1 + bn1 + conv2 + rest2 + linear],
        "layer": [conv1 + bn1, conv2 + rest2, linear],
        "channel": [27] * 8 + [bn1] + [72] * 16 + [rest2] + [16] * 7 + [7],
    }[granularity]


@pytest.mark.parametrize("extract, most", [("PCA", 11), ("Schmidt", 12)])
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_every_block_has_an_orthonormal_basis_of_its_own(granularity, extract, most):
    model = make_model()
    states = walk(model, 12, 1e-2)
    w = rows(model, states)
    basis = Subspace(model, states, extract=extract, granularity=granularity)
    p = dense(basis)
    assert orthogonality_error(p) <= 1e-5
    assert worst_reconstruction(basis, w) <= 1e-5
    # The columns that a direction touches lie in one block.
    widths = widths_of_blocks(granularity)
    edges = torch.tensor([0, *widths]).cumsum(0)
    block_of = torch.bucketize(torch.arange(p.shape[1]), edges[1:], right=True)
    for direction in p:
        assert len(block_of[direction != 0].unique()) == 1
    assert len(basis) == sum(min(most, width) for width in widths)
    alpha = basis.averaging_weights(basis.coordinates(w[4].float()))
    assert alpha.shape == (len(widths), 12)
    for weights, columns in zip(alpha, w.split(widths, dim=1), strict=True):
        torch.testing.assert_close(weights @ columns, columns[4], atol=1e-4, rtol=0)


class Conv1D(nn.Module):
    """As that of transformers, which GPT-2 consists of: its weight is [inputs, outputs]."""

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


@pytest.mark.parametrize(
    "module, inputs",
    [
        (nn.Conv2d(4, 6, 3), (4, 5, 5)),
        (nn.ConvTranspose1d(4, 6, 3), (4, 5)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 5, 5)),
        (nn.ConvTranspose3d(4, 2, 2, bias=False), (4, 3, 3, 3)),
        (Conv1D(5, 3), (3,)),
        (nn.Linear(3, 5), (3,)),
    ],
)
@pytest.mark.parametrize("bits", [32, 8])
def test_a_block_is_an_output_channel(module, inputs, bits, tmp_path):
    """A coefficient of a weight moves one channel of the output, whatever the weight's layout."""
    window = [tmp_path / f"{i}.pt" for i in range(4)]
    for path, state in zip(window, walk(module, 4), strict=True):
        torch.save(state, path)
    batch = torch.randn(2, *inputs, generator=torch.Generator().manual_seed(0))
    optimizer = TWA(module, window, granularity="channel", bits=bits)
    outputs = module(batch)
    moved = []  # by each coefficient: the channels of the output
    for unit in torch.eye(len(optimizer.coefficients)):
        optimizer.set_coefficients(unit)
        change = (module(batch) - outputs).abs().transpose(0, 1).flatten(1).amax(1)
        moved.append((change > 1e-5).nonzero()[:, 0].tolist())
    of_one = [channels[0] for channels in moved if len(channels) == 1]
    channels = range(outputs.shape[1])
    assert [of_one.count(channel) for channel in channels] == [3] * len(channels)
    biases = sum(p.dim() == 1 for p in module.parameters())  # one block, of all channels
    assert len(moved) - len(of_one) == 3 * biases


def test_limits_of_containers_count_as_free_memory(tmp_path):
    """Control groups of version 2 and version 1, and an outer group, in the kernel's files."""
    own, root = tmp_path / "cgroup", tmp_path / "root"

    def group(folder: str, limit: str, used: int, prefix: str = "", names=("max", "current")):
        path = root / folder
        path.mkdir(parents=True, exist_ok=True)
        (path / f"memory.{names[0]}").write_text(f"{limit}\n")
        (path / f"memory.{names[1]}").write_text(f"{used}\n")
        stat = f"anon 5\n{prefix}inactive_file 30\n{prefix}active_file 20\nslab 7\n"
        (path / "memory.stat").write_text(stat)

    assert list(memory.free_in_control_groups(root, own)) == []  # no Linux, no limits
    own.write_text("0::/job/step\n")
    group("job/step", "max", 400)
    assert list(memory.free_in_control_groups(root, own)) == []
    group("job/step", "1000", 400)
    group("job", "900", 880)
    assert list(memory.free_in_control_groups(root, own)) == [650, 70]
    own.write_text("0::/\n")  # as containers see themselves
    group("", "100", 200)
    assert list(memory.free_in_control_groups(root, own)) == [0]
    own.write_text("4:memory:/a\n1:cpu:/a\n")
    group("memory/a", "500", 100, "total_", ("limit_in_bytes", "usage_in_bytes"))
    assert list(memory.free_in_control_groups(root, own)) == [450]


# --- principal directions and the spread along them ---


@pytest.mark.parametrize("components", [None, 4, 100])
@pytest.mark.parametrize("granularity", ["model", "layer", "channel"])
def test_directions_and_spread_are_those_of_an_svd_of_the_centred_window(granularity, components):
    model, n = make_model(), 9
    states = walk(model, n, 0.1)
    w = rows(model, states)
    basis = Subspace(model, states, components=components, granularity=granularity)
    expected, spread, per_block, start = [], [], [], 0
    for columns in w.split(widths_of_blocks(granularity), dim=1):
        _, values, directions = torch.linalg.svd(columns - columns.mean(0), full_matrices=False)
        for i in range(min(n - 1, columns.shape[1], components or n)):
            row = torch.zeros(w.shape[1], dtype=torch.float64)
            row[start : start + columns.shape[1]] = directions[i]
            expected.append(row)
            spread.append(values[i] / n**0.5)
            scatter = (columns @ directions[i]).std(correction=0)
            assert spread[-1] == pytest.approx(scatter.item(), rel=1e-6)
        start += columns.shape[1]
        per_block.append(torch.stack(spread[sum(map(len, per_block)) :]))
    expected, spread = torch.stack(expected), torch.stack(spread)
    torch.testing.assert_close(basis.scale.double(), spread, rtol=1e-5, atol=0)
    torch.testing.assert_close(basis.mean.double(), w.mean(0), rtol=1e-6, atol=1e-7)
    of_blocks = [(s[s > 0].square().mean().sqrt()).expand(len(s)) for s in per_block]
    blocks = Subspace(model, states, components=components, granularity=granularity, unit="block")
    torch.testing.assert_close(blocks.scale.double(), torch.cat(of_blocks), rtol=1e-5, atol=0)
    p = dense(basis)
    assert orthogonality_error(p) <= 1e-6
    signs = (p * expected).sum(1, keepdim=True).sign()
    torch.testing.assert_close(p, signs * expected, rtol=0, atol=1e-4)
    gradient = torch.randn(w.shape[1], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        basis.project(gradient).double(),
        signs[:, 0] * spread * (expected @ gradient.double()),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_checkpoint_has_coordinates_of_mean_zero_and_variance_one():
    model = make_model()
    states = walk(model, 12, 0.1)
    basis = Subspace(model, states, granularity="layer")
    coordinates = torch.stack([basis.coordinates(row.float()) for row in rows(model, states)])
    zero, one = torch.zeros(len(basis)), torch.ones(len(basis))
    torch.testing.assert_close(coordinates.mean(0), zero, atol=1e-5, rtol=0)
    torch.testing.assert_close(coordinates.std(0, correction=0), one, atol=1e-5, rtol=0)


def test_neither_order_nor_scale_of_the_window_changes_the_directions():
    model = make_model()
    states = walk(model, 8, 0.1)
    mean = average(states)
    basis = Subspace(model, states)
    wider = [{k: mean[k] + 5 * (v - mean[k]) for k, v in s.items()} for s in states]
    for others, factor in ((states[::-1], 1), (wider, 5)):
        other = Subspace(model, others)
        torch.testing.assert_close(dense(other), dense(basis), atol=1e-5, rtol=0)
        torch.testing.assert_close(other.scale, factor * basis.scale, atol=0, rtol=1e-4)


@pytest.mark.parametrize("width", [2, 9, 27, 39, 72])
def test_blocks_with_fewer_directions_than_asked_for_keep_those_they_have(width):
    """40 checkpoints, spread in each channel over a range of 1 to 10^decay: rounding is near."""
    n, channels = 40, 4
    rank = min(width, n - 1)
    for decay in range(7):
        generator = torch.Generator().manual_seed(decay)

        def random(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: B023

        spread = torch.logspace(0, -decay, rank, dtype=torch.float64)
        left = torch.linalg.qr(random(channels, n, rank))[0] * spread
        w = left @ torch.linalg.qr(random(channels, width, width))[0][:, :rank]
        w += random(channels, 1, width)
        model = nn.Linear(width, channels, bias=False)
        states = [{"weight": w[:, i].float()} for i in range(n)]
        basis = Subspace(model, states, components=n - 1, granularity="channel")
        p = dense(basis)
        assert orthogonality_error(p) <= 1e-6
        assert channels <= len(basis) <= channels * rank
        if decay < 4:
            assert len(basis) == channels * rank
        assert worst_reconstruction(basis, rows(model, states)) <= 1e-5


def test_two_checkpoints_have_one_direction_half_their_difference():
    model = make_model()
    states = walk(model, 2)
    first, second = rows(model, states)
    basis = Subspace(model, states)
    assert len(basis) == 1
    torch.testing.assert_close(
        basis.expand(torch.ones(1)).double(), (second - first) / 2, atol=1e-6, rtol=0
    )
    expected = torch.tensor([0.0, 1], dtype=torch.float64)
    torch.testing.assert_close(basis.averaging_weights(torch.ones(1)), expected)


def test_equal_checkpoints_share_their_weight_and_none_is_dropped():
    model = make_model()
    first, second = walk(model, 2)
    basis = Subspace(model, [first, second, first])
    assert len(basis) == 1 and basis.dropped == []
    alpha = basis.averaging_weights(basis.coordinates(rows(model, [first])[0].float()))
    expected = torch.tensor([0.5, 0, 0.5], dtype=torch.float64)
    torch.testing.assert_close(alpha, expected, atol=1e-5, rtol=0)


def test_blocks_in_which_nothing_differs_have_no_coefficients():
    model = make_model()
    states = walk(model, 4)
    for state in states:
        state["0.weight"], state["5.bias"] = states[0]["0.weight"], states[0]["5.bias"]
    basis = Subspace(model, states, granularity="channel")
    assert len(basis) == 3 * (1 + 16 + 1 + 7)
    assert (basis.expand(torch.randn(len(basis)))[: 8 * 27] == 0).all()
    assert (basis.averaging_weights(torch.randn(len(basis)))[:8] == 0.25).all()


@pytest.mark.parametrize("count", [1, 3])
def test_checkpoints_that_do_not_differ_are_refused(count):
    model = make_model()
    with pytest.raises(ValueError, match="two checkpoints or more" if count == 1 else "not differ"):
        Subspace(model, walk(model, 1) * count)


# --- truncation ---


@pytest.mark.parametrize("bits", [32, 8])
def test_the_leading_principal_directions_are_kept(bits):
    model = make_model()
    states = walk(model, 15, 0.3)
    w = rows(model, states)
    basis = Subspace(model, states, components=4, bits=bits)
    assert len(basis) == 4
    _, values, directions = torch.linalg.svd(w - w.mean(0), full_matrices=False)
    p = dense(basis)
    overlap = (p @ directions[:4].mT).abs()
    near = 1e-5 if bits == 32 else 2e-2
    torch.testing.assert_close(overlap, torch.eye(4, dtype=torch.float64), atol=near, rtol=0)
    torch.testing.assert_close(
        basis.scale.double(), values[:4] / math.sqrt(len(w)), atol=0, rtol=1e-4
    )
    torch.testing.assert_close(basis.mean.double(), w.mean(0), atol=1e-6, rtol=0)
    if bits == 32:
        assert orthogonality_error(p) <= 1e-5


@pytest.mark.parametrize("granularity", ["model", "layer", "channel"])
def test_more_components_than_directions_span_the_window(granularity):
    model = make_model()
    states = walk(model, 6)
    basis = Subspace(model, states, components=10, granularity=granularity)
    assert worst_reconstruction(basis, rows(model, states)) <= 1e-5
    assert orthogonality_error(dense(basis)) <= 1e-5


# --- any shape ---


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    shapes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=5),
    n=st.integers(1, 8),
    bits=st.sampled_from(BITS),
    granularity=st.sampled_from(["model", "layer", "channel"]),
    extract=st.sampled_from([("PCA", None), ("PCA", 1), ("PCA", 3), ("Schmidt", None)]),
    seed=st.integers(0, 99),
)
@pytest.mark.filterwarnings("ignore:.*depend linearly")
def test_any_shapes_give_adjoint_products_and_coefficients_that_count(
    shapes, n, bits, granularity, extract, seed
):
    model = nn.Module()
    for i, shape in enumerate(shapes):
        layer = nn.Module()
        layer.weight = nn.Parameter(torch.zeros(shape))
        model.add_module(f"layer{i}", layer)
    states = walk(model, max(n, 2), 0.5, seed)
    basis = Subspace(
        model,
        states,
        extract=extract[0],
        components=extract[1],
        bits=bits,
        granularity=granularity,
    )
    p = dense(basis)
    assert p.isfinite().all() and (p != 0).any(dim=1).all()
    scaled = p if basis.scale is None else p * basis.scale.double()[:, None]
    gradient = torch.randn(p.shape[1], generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        basis.project(gradient).double(), scaled @ gradient.double(), atol=1e-5, rtol=1e-4
    )
    if bits == 32:
        assert orthogonality_error(p) <= 1e-5
        if extract[1] is None:
            assert worst_reconstruction(basis, rows(model, states)) <= 1e-5


# --- refused ---


@pytest.mark.parametrize(
    "arguments",
    [
        {"extract": "principal"},
        {"bits": 2},
        {"granularity": "neuron"},
        {"extract": "SVD"},
        {"components": 0},
        {"extract": "Schmidt", "components": 3},
        {"unit": "model"},
        {"extract": "Schmidt", "unit": "block"},
    ],
)
def test_an_argument_out_of_its_range_is_refused(arguments):
    model = make_model()
    with pytest.raises(ValueError, match=[*arguments][-1]):
        Subspace(model, walk(model, 3), **arguments)


def test_no_checkpoints_are_refused():
    with pytest.raises(ValueError, match="no checkpoints"):
        Subspace(make_model(), [])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bits", [32, 4])
def test_nan_and_infinity_are_refused_by_name(value, bits, tmp_path):
    model = make_model()
    paths = []
    for i, state in enumerate(walk(model, 4)):
        if i == 2:
            state["2.weight"][3, 1, 0, 2] = value
        paths.append(tmp_path / f"{i}.pt")
        torch.save(state, paths[-1])
    with pytest.raises(CheckpointError, match=r"2\.pt.*NaN or infinity"):
        Subspace(model, paths, bits=bits)


def test_another_architecture_is_refused_with_key_and_shapes():
    model = make_model()
    states = walk(model, 2)
    states[1]["2.weight"] = torch.zeros(16, 8, 5, 5)
    shapes = r"checkpoints\[1\]: .* 2\.weight is \[16, 8, 5, 5\] there and \[16, 8, 3, 3\]"
    with pytest.raises(CheckpointError, match=shapes):
        Subspace(model, states)


def test_too_little_memory_is_refused_before_anything_is_read_and_says_what_fits(monkeypatch):
    model = nn.Linear(1000, 100, bias=False)
    states = walk(model, 1) * 60
    monkeypatch.setattr(subspace, "free_memory", lambda device: 10_000_000)
    monkeypatch.setattr(window.Window, "_read", lambda *a: pytest.fail("read a checkpoint"))
    with pytest.raises(MemoryError) as error:
        Subspace(model, states)
    message = str(error.value)
    assert "\n" not in message
    for part in ("60 checkpoints of 100,000 weights", "0.0 GB are free", "checkpoints or", "ranks"):
        assert part in message


# --- an accelerator, where there is one ---


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("granularity", ["model", "layer", "channel"])
def test_cuda_equals_the_cpu(bits, granularity, monkeypatch):
    torch.manual_seed(0)
    states = walk(make_model(), 10)
    compile_small(monkeypatch)
    on_cpu = Subspace(make_model(), states, bits=bits, granularity=granularity)
    on_gpu = Subspace(make_model().to("cuda"), states, bits=bits, granularity=granularity)
    assert on_gpu.nbytes == on_cpu.nbytes
    gradient = torch.randn(sum(p.numel() for p in on_cpu.parameters))
    coefficients = torch.randn(len(on_cpu))
    torch.testing.assert_close(
        on_gpu.project(gradient.to("cuda")).cpu(), on_cpu.project(gradient), atol=1e-3, rtol=1e-3
    )
    torch.testing.assert_close(
        on_gpu.expand(coefficients.to("cuda")).cpu(),
        on_cpu.expand(coefficients),
        atol=1e-3,
        rtol=1e-3,
    )

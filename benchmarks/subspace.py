"""The basis against the paper release's way of making it: time, memory and exactness.

    python benchmarks/subspace.py
    python benchmarks/subspace.py --checkpoints 50 --weights 1_000_000

Synthetic checkpoints that sit close together, as those of one run do, are written to a temporary
folder; every basis is built from these files in a fresh process, whose peak memory is taken. The
products are then timed side by side in one process, in turns. The table is Markdown.
"""

import math
import multiprocessing
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from training.settings import Parser
from twa import Subspace

SEED = 1
RELEASE = "row by row, as the paper's release"
SCHMIDT = "Gram–Schmidt"


def main():
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("--checkpoints", type=int, default=100, help="how many, n")
    parser.add_argument("--weights", type=int, default=10_000_000, help="of the model, about")
    parser.add_argument("--layers", type=int, default=50, help="of the model")
    parser.add_argument("--step", type=float, default=1e-3, help="of a checkpoint, over its norm")
    parser.add_argument("--builds", type=int, default=3, help="of each basis; the median counts")
    parser.add_argument("--repeats", type=int, default=11, help="of each product, likewise")
    parser.add_argument("--device", default="cpu", help="of the model and its basis")
    args = parser.parse_args()

    variants = {
        "32 bits": {},
        "32 bits, by layer": {"granularity": "layer"},
        "8 bits": {"bits": 8},
        "4 bits": {"bits": 4},
        "8 bits, by layer": {"bits": 8, "granularity": "layer"},
        f"{args.checkpoints // 5} directions": {"components": args.checkpoints // 5},
        SCHMIDT: {"extract": "Schmidt"},
        f"{SCHMIDT}, by layer": {"extract": "Schmidt", "granularity": "layer"},
        f"{SCHMIDT}, 8 bits": {"extract": "Schmidt", "bits": 8},
    }
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoints(folder, args, make_model(args))
        builds = {name: [] for name in [RELEASE, *variants]}
        # A build can reuse memory that the one before it freed: a random order is fair to all.
        order = random.Random(SEED)
        for _ in range(args.builds):
            for name in order.sample(list(builds), len(builds)):
                builds[name].append(apart(build, folder, args, variants.get(name)))
        exact = apart(exactness, folder, args)
        products = {name: apart(time_products, folder, args, o) for name, o in variants.items()}
    print_table(args, builds, exact, products)


def print_table(args, builds: dict, exact: dict, products: dict):
    """Prints a row for each way to build and store the basis."""
    total = sum(p.numel() for p in make_model(args, "meta").parameters())
    print(
        f"{args.checkpoints} checkpoints of {total:,} weights, steps of {args.step:g} of the norm; "
        f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads; two "
        f"checkpoints are "
        f"{8 * total / 1e9:.2f} GB\n"
    )
    print(
        "| basis | build s | times faster | basis GB | peak / basis | max abs(PPᵀ − I) "
        "| project + expand ms | / two torch.mv | / 32 bits | error of expand |"
    )
    print("| --- " * 10 + "|")
    release = statistics.median(seconds for seconds, _, _ in builds[RELEASE])
    for name, measured in builds.items():
        seconds, size, peak = (statistics.median(column) for column in zip(*measured, strict=True))
        row = [name, f"{seconds:.1f}", f"{release / seconds:.1f}", f"{size / 1e9:.2f}"]
        row += [f"{peak / size:.2f}", f"{exact[name]:.1e}" if name in exact else ""]
        if name == RELEASE:
            passes = statistics.median(passes for _, passes, _, _ in products.values())
            row += [f"{passes * 1e3:.0f} (two torch.mv)", "1.00", "", ""]
        else:
            own, passes, reference, error = products[name]
            row += [f"{own * 1e3:.0f}", f"{own / passes:.2f}", f"{own / reference:.2f}"]
            row += [f"{error:.1e}" if error > 0 else ""]
        print("| " + " | ".join(row) + " |")


def make_model(args, device=None) -> nn.Module:
    """`args.layers` square linear layers, about `args.weights` weights together."""
    side = math.isqrt(args.weights // args.layers)
    layers = (nn.Linear(side, side, device="meta") for _ in range(args.layers))
    return nn.Sequential(*layers).to_empty(device=device or args.device)


def checkpoints(folder: str, args) -> list[Path]:
    return [Path(folder, f"{number}.pt") for number in range(args.checkpoints)]


def write_checkpoints(folder: str, args, model: nn.Module):
    """Writes a random walk: a step is `args.step` of the weights' norm, in a random direction."""
    torch.manual_seed(SEED)
    state = {key: torch.randn(t.shape) for key, t in model.state_dict().items()}
    for path in tqdm(checkpoints(folder, args), desc="writing", leave=False, disable=None):
        torch.save(state, path)
        for tensor in state.values():
            tensor.add_(torch.randn_like(tensor), alpha=args.step)


def release_basis(folder: str, args) -> Tensor:
    """The basis as the paper's release makes it.

    Every checkpoint is loaded into the model and its parameters are flattened; the vectors are
    gathered in one matrix, and classical Gram–Schmidt takes them row by row, in float32.
    """
    model = make_model(args)
    rows = []
    for path in checkpoints(folder, args):
        model.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
        rows.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    basis = torch.stack(rows)
    for i in range(len(basis)):
        basis[i] -= basis[:i].T @ (basis[:i] @ basis[i])
        basis[i] /= basis[i].norm()
    return basis


def apart(function, *arguments):
    """`function(*arguments)` in a fresh process, so that its peak memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def build(folder: str, args, options: dict | None) -> tuple[float, int, int]:
    """Seconds to build a basis, its bytes, and the peak of the memory it took, in bytes.

    Args:
        options: those of `Subspace`; None builds the release's basis.
    """
    model = make_model(args)
    paths = checkpoints(folder, args)
    torch.load(paths[0], mmap=True, weights_only=True)  # Imports modules, untimed.
    for path in paths:
        path.read_bytes()  # Into the system's memory: the disk is not timed either.
    before, start = peak_memory(args), time.perf_counter()
    if options is None:
        size = release_basis(folder, args).nbytes
    else:
        size = Subspace(model, paths, **options).nbytes
    synchronize(args)
    return time.perf_counter() - start, size, peak_memory(args) - before


def synchronize(args) -> None:
    if args.device != "cpu":
        torch.accelerator.synchronize()


def peak_memory(args) -> int:
    if args.device != "cpu":
        return torch.accelerator.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def exactness(folder: str, args) -> dict[str, float]:
    """The largest entry of `P Pᵀ − I`, in float64."""
    errors = {RELEASE: orthogonality(release_basis(folder, args))}
    for name, options in (("32 bits", {}), (SCHMIDT, {"extract": "Schmidt"})):
        subspace = Subspace(make_model(args), checkpoints(folder, args), **options)
        errors[name] = orthogonality(subspace._matrix.rows)
    return errors


def orthogonality(basis: Tensor) -> float:
    gram = -torch.eye(len(basis), dtype=torch.float64, device=basis.device)
    for chunk in basis.split(2**14, dim=1):
        gram += chunk.double() @ chunk.double().T
    return gram.abs().max().item()


def time_products(folder: str, args, options: dict) -> tuple[float, float, float, float]:
    """Times project and expand together, in turns with two references on the same data.

    Returns:
        median seconds of the basis with `options`, of two `torch.mv` passes over the matrix of 32
        bits, and of the basis of 32 bits; and the error of expand, relative to 32 bits.
    """
    model, paths = make_model(args), checkpoints(folder, args)
    torch.manual_seed(SEED)
    subspace = Subspace(model, paths, **options)
    exact = Subspace(model, paths, extract=options.get("extract", "PCA"))
    matrix = exact._matrix.rows
    gradients = torch.randn(matrix.shape[1], device=args.device)
    coefficients = torch.randn(len(matrix), device=args.device)
    out = torch.empty_like(gradients)  # Allocated before, as in a training loop.

    def both(basis: Subspace):
        basis.project(gradients)
        basis.expand(torch.ones(len(basis), device=args.device), out=out)

    def passes():
        torch.mv(matrix, gradients)
        torch.mv(matrix.T, coefficients, out=out)

    turns = {"own": lambda: both(subspace), "mv": passes, "32 bits": lambda: both(exact)}
    seconds = time_in_turns(args, turns)
    error = math.nan
    if len(subspace) == len(exact):
        reference = exact.expand(coefficients)
        error = float((subspace.expand(coefficients) - reference).norm() / reference.norm())
    return *seconds.values(), error


def time_in_turns(args, turns: dict[str, Callable[[], None]]) -> dict[str, float]:
    """The median seconds of each of `turns`, called one after the other `args.repeats` times."""
    seconds = {name: [] for name in turns}
    for repeat in range(args.repeats + 1):
        for name, turn in turns.items():
            synchronize(args)
            start = time.perf_counter()
            turn()
            synchronize(args)
            if repeat:  # The first turn compiles.
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(column) for name, column in seconds.items()}


if __name__ == "__main__":
    main()

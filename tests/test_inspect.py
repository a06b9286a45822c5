"""`twa inspect`: its numbers against plain distances in float64, and what it says of a window."""

import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from twa.command.inspecting import Geometry, geometry
from twa.command.main import main
from twa.command.mean import Checkpoints


def state(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"a": rows[:6].view(2, 3).clone(), "b": rows[6:].clone(), "n": torch.tensor(3)}


def window(folder, points: torch.Tensor) -> list:
    paths = [folder / f"step-{10 * (i + 1)}.safetensors" for i in range(len(points))]
    for i, (path, point) in enumerate(zip(paths, points, strict=True)):
        save_file(state(point), path)
        os.utime(path, (1000 + i, 1000 + i))
    return paths


def test_distances_cosines_and_spectrum_are_those_of_the_weights(tmp_path):
    torch.manual_seed(0)
    points = (100 + torch.randn(6, 40)).float()
    found, odd = geometry(Checkpoints(window(tmp_path, points)), lambda _: None)
    exact = points.double()
    assert odd == [None] * 6
    torch.testing.assert_close(found.distances, torch.cdist(exact, exact), rtol=1e-9, atol=1e-6)
    centred = exact - exact.mean(0)
    torch.testing.assert_close(found.to_mean, centred.norm(dim=1), rtol=1e-9, atol=1e-9)
    moves = exact.diff(dim=0)
    cosines = torch.cosine_similarity(moves[1:], moves[:-1])
    torch.testing.assert_close(found.cosines, cosines, rtol=1e-9, atol=1e-9)
    values = torch.linalg.svdvals(centred)[:5].square()
    torch.testing.assert_close(found.spectrum, values / values.sum(), rtol=1e-9, atol=1e-9)


def gram_of(points: torch.Tensor) -> torch.Tensor:
    rows = torch.cat([points[:1], points.diff(dim=0)]).double()
    return rows @ rows.T


@pytest.mark.parametrize(
    "kind, words",
    [
        ("around a point", "the mean of all"),
        ("straight on", "average the last few"),
        ("random walk", "the means of the last 2, 4, 8"),
        ("decayed", "the learning rate has decayed"),
    ],
)
def test_the_advice_follows_the_kind_of_window(kind, words):
    torch.manual_seed(0)
    noise = torch.randn(12, 500)
    moves = torch.logspace(0, -2, 12)[:, None]
    points = {
        "around a point": noise,
        "straight on": torch.arange(12)[:, None] * torch.ones(500) + 0.2 * noise,
        "random walk": noise.cumsum(0),
        "decayed": (moves * noise).cumsum(0),
    }
    assert words in Geometry(gram_of(points[kind])).advice


def test_the_command_says_what_is_there_and_what_is_odd(tmp_path, capsys):
    torch.manual_seed(0)
    points = torch.randn(5, 40)
    paths = window(tmp_path, points)
    broken = state(points[2])
    broken["a"][0, 1] = torch.nan
    save_file(broken, paths[2])
    os.utime(paths[2], (500, 500))
    save_file({"other": torch.ones(2)}, tmp_path / "step-25.safetensors")
    os.link(paths[4], tmp_path / "step-60.safetensors")
    figure = tmp_path / "window.png"
    assert main(["inspect", str(tmp_path), "--figure", str(figure)]) == 0
    out = capsys.readouterr().out
    assert "5 checkpoints of 3 tensors, 0.000 GB each (float32, int64)" in out
    assert f"note: {tmp_path}/step-25.safetensors: of another architecture: a is missing" in out
    assert f"note: {paths[2]}: a holds NaN or infinity" in out
    assert f"note: {paths[2]} is older than {paths[1]}" in out
    assert "step-60.safetensors is the same as" in out
    assert "of 4 directions have 90 % of the spread" in out
    move = float((points[1].double() - points[0].double()).norm())
    (line,) = [line for line in out.splitlines() if line.startswith(f"{paths[1]} ")]
    assert float(line.split()[2]) == pytest.approx(move, rel=1e-3)
    assert figure.read_bytes()[:4] == b"\x89PNG"


def test_checkpoints_of_torch_and_one_alone(tmp_path, capsys):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "1.pt")
    assert main(["inspect", str(tmp_path / "1.pt")]) == 0
    assert "1 checkpoints of 2 tensors" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "gone")]) == 2
    assert capsys.readouterr().err.count("\n") == 1

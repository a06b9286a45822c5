"""Draws the method: checkpoints of a trajectory, the plane that they span, and TWA's way in it.

python docs/schematic.py    # writes docs/schematic.png
"""

import itertools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

OUT = Path(__file__).with_suffix(".png")
# The plane of the picture is seen from the side: its two axes, and the direction out of it.
AXES = np.array([[1.0, 0.0], [0.55, 0.62]])
UP = np.array([0.0, 1.0])
OPTIMUM = np.array([2.2, 0.35])
LABEL = {"facecolor": "#ebf4ff", "edgecolor": "none", "pad": 1}
BLUE, RED, GREY, GREEN = "#2b6cb0", "#c53030", "#718096", "#2f855a"


def seen(points: np.ndarray, height: float = 0.0) -> np.ndarray:
    """Points of the plane, [..., 2], as they are seen."""
    return points @ AXES + height * UP


def beside(point: np.ndarray, right: float, up: float) -> np.ndarray:
    return point + np.array([right, up])


def main():
    _, axes = plt.subplots(figsize=(8, 3.6), dpi=160)
    corners = np.array([[-0.6, -1.6], [4.6, -1.6], [4.6, 1.9], [-0.6, 1.9]])
    axes.fill(*seen(corners).T, color="#ebf4ff", zorder=0)
    axes.annotate("span of the checkpoints", beside(seen(corners[1]), -1.9, 0.1), color=GREY)

    angle = np.linspace(0, 2 * np.pi, 200)
    for radius in (0.35, 0.75, 1.2):
        ellipse = OPTIMUM + radius * np.stack([1.25 * np.cos(angle), np.sin(angle)], axis=1)
        axes.plot(*seen(ellipse).T, color="#bee3f8", lw=1, zorder=1)

    # A constant rate keeps the trajectory on the walls of the valley.
    checkpoints = np.array(
        [[0.2, -0.9], [0.75, 1.1], [1.35, -1.05], [1.9, 1.35], [2.75, -0.75], [3.1, 1.2]]
    )
    generator = np.random.default_rng(2)
    heights = []
    for start, stop in itertools.pairwise(checkpoints):
        between = np.linspace(0, 1, 9)[:, None]
        way = seen(start + between * (stop - start))
        noise = generator.normal(0, 0.1, (9, 2))
        noise[[0, -1]] = 0
        heights.append(way + noise)
    axes.plot(*np.concatenate(heights).T, color=GREY, lw=0.8, zorder=2)
    axes.scatter(*seen(checkpoints).T, color=BLUE, s=36, zorder=4)
    axes.annotate("checkpoints of training", beside(seen(checkpoints[0]), -0.35, -0.34), color=BLUE)

    mean = checkpoints.mean(0)
    twa = beside(OPTIMUM, 0.06, 0.0)
    axes.scatter(*seen(mean), marker="s", color=GREEN, s=46, zorder=5)
    axes.annotate("their mean", beside(seen(mean), -0.98, 0.06), color=GREEN, bbox=LABEL)
    axes.scatter(*seen(twa), marker="*", color=RED, s=190, zorder=6)
    axes.annotate("TWA", beside(seen(twa), 0.15, 0.02), color=RED, weight="bold")

    # The gradient leaves the plane; only its projection moves the coefficients.
    foot = mean + 1.9 * (twa - mean)
    arrow = {"arrowstyle": "-|>", "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
    top = seen(foot, 1.15)
    axes.annotate("", top, seen(mean), arrowprops=arrow | {"color": GREY})
    axes.annotate("− gradient of all weights", beside(top, 0.05, 0.05), color=GREY)
    axes.annotate("", seen(twa), seen(mean), arrowprops=arrow | {"color": RED})
    axes.plot(*np.stack([top, seen(foot)]).T, color=GREY, lw=0.8, ls=":")
    axes.annotate("projected", beside(seen(mean), 0.08, -0.24), color=RED, bbox=LABEL)

    axes.set_aspect("equal")
    axes.axis("off")
    plt.savefig(OUT, bbox_inches="tight", pad_inches=0.05)


if __name__ == "__main__":
    main()

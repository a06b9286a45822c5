"""Averaging weights in a file: α of each parameter for each checkpoint of a window."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from twa.files.reading import CheckpointError, refusing

NAME = "twa_weights.safetensors"  # of the file that train_twa.py writes


def save_weights(
    named: Mapping[str, Tensor], checkpoints: Sequence[str | os.PathLike], path: str | os.PathLike
) -> None:
    """Writes the result of `TWA.named_averaging_weights` and the names of the checkpoints."""
    names = json.dumps([Path(checkpoint).name for checkpoint in checkpoints])
    save_file(
        {k: v.clone(memory_format=torch.contiguous_format) for k, v in named.items()},
        path,
        {"checkpoints": names},
    )


@refusing
def load_weights(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The averaging weights in `path`, and the names of their checkpoints in the same order.

    Raises:
        CheckpointError: it is no file of `save_weights`.
    """
    with safe_open(path, framework="pt") as file:
        names = (file.metadata() or {}).get("checkpoints")
        if names is None:
            raise CheckpointError(f"{path}: holds no averaging weights ({NAME})")
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(names)  # noqa: SIM118

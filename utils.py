"""Errors that a user can mend, the device and the seed."""

import random
from pathlib import Path

import numpy as np
import torch

from twa.files.reading import one_line


class UserError(Exception):
    """An error that the user can mend: one line on stderr, exit status 2."""


def make_directory(directory: Path) -> None:
    """Makes `directory` with its parents; a `UserError` names one that cannot be made."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: cannot be made ({error.strerror})") from None


def choose_device(name: str | None, index: int | None = None) -> torch.device:
    """The device that `--device` names, or the accelerator if there is one, else the CPU.

    Args:
        index: of the accelerator to take, if several processes on this machine take one each.

    Raises:
        UserError: the device is not usable here.
    """
    if name is None:
        accelerator = torch.accelerator.is_available()
        name = torch.accelerator.current_accelerator().type if accelerator else "cpu"
    try:
        device = torch.device(name)
        if device.type != "cpu" and index is not None:
            if device.index is not None:
                raise UserError(
                    f"--device {name}: every rank would take this one; give --device {device.type}"
                )
            device = torch.device(device.type, index)
        torch.zeros((), device=device).item()  # "meta" holds nothing
        return device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = f"not usable here ({one_line(error)})"
        raise UserError(f"--device {name}: {reason}; try --device cpu") from None


def set_seed(seed: int) -> None:
    """Seeds Python, NumPy and torch, on the CPU and on every accelerator."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)

"""Models of the user's own: the function that `--model-factory MODULE:FUNCTION` names.

It is imported from the current directory, PYTHONPATH, and then the repository's root. Where a
module of the user's has the name of one of ours, ours is removed from `sys.modules` for good: the
scripts have imported it by then, and what imports that name later (a forward pass, `torch.compile`)
means the user's.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from utils import UserError

_ROOT = Path(__file__).resolve().parents[1]


def build(name: str, example: torch.Tensor, shape: tuple[int, ...]) -> nn.Module:
    """The model that `module:function` returns, called without arguments and tried once.

    If the model returns an object with `logits`, as those of transformers do, it returns these
    alone from then on.

    Args:
        example: a batch that it must take: images, float [B, C, H, W], or tokens, int64 [B, T].
        shape: of the logits that it must return: [B, classes], or [B, T, vocabulary].

    Raises:
        UserError: the function is missing or fails, or does not return a model with trainable
            parameters that maps `example` to logits of this `shape`.
    """
    module, _, function = name.partition(":")
    name = f"--model-factory {name}"
    removed = _prefer_the_users()
    try:
        model = getattr(importlib.import_module(module), function)()
    except Exception as error:  # whatever the user's code may raise
        raise UserError(
            f"{name}: cannot be imported from the current directory or PYTHONPATH and called "
            f"({_one_line(error)})"
        ) from None
    if not isinstance(model, nn.Module):
        raise UserError(f"{name}: returns a {type(model).__name__}, not an nn.Module")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"{name}: returns a model without parameters to train")
    model.register_forward_hook(_logits)
    given = "images" if example.is_floating_point() else "tokens"
    try:
        with torch.no_grad():
            logits = model.eval()(example)
    except Exception as error:
        size, reason = tuple(example.shape), _one_line(error)
        raise UserError(f"{name}: does not take {given} of shape {size} ({reason})") from None
    if not isinstance(logits, torch.Tensor):
        raise UserError(f"{name}: gives a {type(logits).__name__}, not a tensor of logits")
    if logits.shape != shape:
        raise UserError(
            f"{name}: gives logits of shape {list(logits.shape)} for {given} of shape "
            f"{list(example.shape)}, and the data set needs {list(shape)}"
        )
    for key, ours in removed.items():  # pickling for worker processes looks classes up by name
        sys.modules.setdefault(key, ours)
    return model


def _logits(_, __, output: object) -> object:
    return getattr(output, "logits", output)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


@dataclass(frozen=True)
class _UsersFirst:
    """A finder for `sys.meta_path` that looks into the user's folders before all else does.

    `sys.path` itself stays unchanged, because worker processes get a copy of it.
    """

    folders: tuple[str, ...]

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, self.folders) if path is None else None
        if spec and spec.loader is None:  # a folder without __init__.py: of checkpoints, perhaps
            places = map(Path, spec.submodule_search_locations)
            return spec if any(any(place.glob("*.py")) for place in places) else None
        return spec


def _prefer_the_users() -> dict[str, ModuleType]:
    """Puts the user's modules before ours, and removes ours that have the name of one of theirs.

    Returns:
        The submodules that were removed.
    """
    entries = [os.getcwd(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    folders = tuple(os.path.abspath(entry) for entry in entries if Path(entry).resolve() != _ROOT)
    finder = _UsersFirst(folders)
    if finder not in sys.meta_path:
        sys.meta_path.insert(sys.meta_path.index(PathFinder), finder)

    def shadowed(name: str) -> bool:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is None or name == "__main__" or _ROOT not in Path(file).resolve().parents[:2]:
            return False  # not a module or package of ours
        spec = finder.find_spec(name)
        return spec is not None and os.path.realpath(spec.origin or "") != os.path.realpath(file)

    tops = {name for name in {key.partition(".")[0] for key in sys.modules} if shadowed(name)}
    keys = [key for key in sys.modules if key.partition(".")[0] in tops]
    removed = {key: sys.modules.pop(key) for key in keys}
    return {key: module for key, module in removed.items() if "." in key}

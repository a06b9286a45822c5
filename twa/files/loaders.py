"""The loaders of a model's own library, asked on a copy of it what a checkpoint means.

Modules rename, reshape and compute by hooks and `_load_from_state_dict`; PEFT and transformers
write other names than their models have. What these loaders would do to the model they do to a
copy here, all of which but the tensors in question is on `meta`.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Set

import torch
from torch import Tensor, nn

from twa.files.reading import Stored, tensor_of


def by_modules(
    model: nn.Module,
    given: Mapping[str, Tensor | Stored],
    spare: Collection[str],
    versions: Mapping[str, dict],
    place_of: Callable[[str], str | None],
    wanted: Set[str],
) -> dict[str, Tensor]:
    """What the modules would load by their own `load_state_dict`, by the keys of `model`.

    Modules are asked that load otherwise than by names and shapes, parts before the whole.

    Args:
        given: the tensors of the checkpoint, by their names within wrappers.
        spare: the names in it that the model does not have.
        versions: of the modules that saved them, as torch keeps them in `_metadata`.
        place_of: the prefix in `given` of what belongs to the module whose keys have a prefix; None
            if more than what is given belongs to it.
        wanted: the keys of the tensors in question.
    """
    found: dict[str, Tensor] = {}
    for path, module in reversed([*model.named_modules(remove_duplicate=False)]):
        start = f"{path}." if path else ""
        inside = {key.removeprefix(start) for key in wanted - found.keys() if key.startswith(start)}
        place = place_of(start) if inside and _has_own_loader(module) else None
        if place is None or not any(name.startswith(place) for name in spare):
            continue
        state = OrderedDict(
            (name.removeprefix(place), tensor_of(value))
            for name, value in given.items()
            if name.startswith(place)
        )
        state._metadata = OrderedDict(
            (name.removeprefix(place).removesuffix("."), version)
            for name, version in versions.items()
            if name.startswith(place)
        )
        new = _loaded(module, inside, lambda m, s=state: m.load_state_dict(s, False, assign=True))
        if not inside.isdisjoint(new):
            found |= {start + key: value for key, value in new.items()}
    return found


def _has_own_loader(module: nn.Module) -> bool:
    """Whether `module` loads otherwise than by names and shapes."""
    return bool(
        module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
        or type(module).load_state_dict is not nn.Module.load_state_dict
        or not module._load_from_state_dict.__module__.startswith("torch.nn.modules.")
    )


def by_peft(
    model: nn.Module, state: Mapping[str, Tensor | Stored], wanted: Collection[str]
) -> dict[str, Tensor]:
    """What PEFT would load of an adapter, by the names of its model; {} if there is none.

    Args:
        wanted: names in `model` of the tensors in question.
    """
    peft = sys.modules.get("peft")
    path, module = _first(model, getattr(peft, "PeftModel", ()))
    if module is None:
        return {}

    def load(target: nn.Module) -> None:
        adapter = module.active_adapter
        given = {name: tensor_of(value) for name, value in state.items()}
        peft.set_peft_model_state_dict(target, given, adapter, low_cpu_mem_usage=True)

    inside = {key.removeprefix(path) for key in wanted if key.startswith(path)}
    return {path + key: value for key, value in _loaded(module, inside, load).items()}


def by_transformers(
    model: nn.Module, state: Mapping[str, Tensor | Stored], _: Collection[str]
) -> dict[str, Tensor]:
    """What transformers' `from_pretrained` would load, by the keys of `model`; {} if nothing."""
    transformers = sys.modules.get("transformers")
    path, module = _first(model, getattr(transformers, "PreTrainedModel", ()))
    if module is None:
        return {}
    dtypes = {torch.float32, *(p.dtype for p in module.parameters() if p.is_floating_point())}
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        with _quiet("transformers"), torch.random.fork_rng(devices=[]):
            made, report = type(module).from_pretrained(
                None,
                config=copy.deepcopy(module.config),
                state_dict={name: tensor_of(value) for name, value in state.items()},
                dtype=max(dtypes, key=lambda dtype: dtype.itemsize),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception:  # it cannot say what the checkpoint means
        return {}
    finally:
        if shown:
            bars.enable_progress_bar()
    absent = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    return {path + k: v for k, v in made.state_dict().items() if k not in absent}


def _first(model: nn.Module, kind: type | tuple) -> tuple[str, nn.Module | None]:
    """The first module of `kind` in `model`, after its path, which ends in a dot unless empty."""
    modules = ((f"{p}." if p else "", m) for p, m in model.named_modules() if isinstance(m, kind))
    return next(modules, ("", None))


def _loaded(
    module: nn.Module, wanted: Collection[str], load: Callable[[nn.Module], None]
) -> dict[str, Tensor]:
    """The tensors that `load` puts into a copy of `module`, by the names in its `state_dict`."""
    with _quiet("torch"), torch.no_grad():
        try:
            target = _copy(module, wanted)
        except Exception:  # some modules cannot be copied, as those that FSDP2 shards
            return {}
        before = target.state_dict(keep_vars=True)
        kept = {k: (v._version, v.clone()) for k, v in before.items() if isinstance(v, Tensor)}
        with contextlib.suppress(Exception):  # What it loaded until then is there all the same.
            load(target)
        after = target.state_dict(keep_vars=True)
    found = {}
    for key, value in after.items():
        if not isinstance(value, Tensor) or value.is_meta:
            continue
        version, old = kept.get(key, (None, None))
        same = before.get(key) is value and value._version == version and torch.equal(value, old)
        if not same:
            found[key] = value.detach()
    return found


def _copy(module: nn.Module, real: Collection[str]) -> nn.Module:
    """A copy of `module`, on `meta` but for the tensors of the names `real`, on the CPU."""
    memo: dict[int, object] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            values = tensor.detach()
            there = name in real and not values.is_meta
            values = values.cpu().clone() if there else values.to("meta")
            if isinstance(tensor, nn.Parameter):
                values = nn.Parameter(values, requires_grad=tensor.requires_grad)
            memo.setdefault(id(tensor), values)
    for part in module.modules():  # other tensors, of which some cannot be copied
        for holder in (vars(part), part._parameters, part._buffers):
            for value in holder.values():
                if isinstance(value, Tensor):
                    memo.setdefault(id(value), value.detach().clone())
    return copy.deepcopy(module, memo)


@contextlib.contextmanager
def _quiet(name: str):
    """Without warnings, and without what the logger `name` says below errors."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

"""`full_precision`: methods that compute in float32, whatever the caller has set."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch


def full_precision(method: Callable) -> Callable:
    """`method` of a `Subspace`, without gradients, autocast and TF32."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for kind in {"cpu", self.parameters[0].device.type}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            stack.enter_context(_ieee_products())
            return method(self, *args, **kwargs)

    return wrapped


@contextlib.contextmanager
def _ieee_products() -> Iterator[None]:
    """A context in which products of float32 matrices are not rounded to TF32 or bfloat16."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    if not hasattr(backends[0], "fp32_precision"):  # torch < 2.9 has one setting for all backends.
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    precisions = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, precisions, strict=True):
            backend.fp32_precision = precision

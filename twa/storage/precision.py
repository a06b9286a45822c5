"""`full_precision`: methods that compute in float32, whatever the caller has set."""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch


def full_precision(method: Callable) -> Callable:
    """`method` of a `Subspace`, without gradients, autocast and TF32."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        on_cpu = torch.autocast("cpu", enabled=False)
        on_device = torch.autocast(self.parameters[0].device.type, enabled=False)
        with torch.no_grad(), on_cpu, on_device, _ieee_products():
            return method(self, *args, **kwargs)

    return wrapped


@contextlib.contextmanager
def _ieee_products() -> Iterator[None]:
    """A context in which products of float32 matrices are not rounded to TF32 or bfloat16."""
    with contextlib.ExitStack() as stack:
        for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
            stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
            backend.fp32_precision = "ieee"
        yield

"""The end of differentiation: backward passes of custom functions, which have no derivative of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from vqmoe_ds.runtime.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")


def first_derivative_only(backward: Callable[P, T]) -> Callable[P, T]:
    """Decorator of the ``backward`` of a custom function: refuses ``create_graph=True``.

    PyTorch's ``once_differentiable`` refuses later and not always: a Hessian by the input misses its error, which hangs
    in no path to that input, and a gradient that depends on none before it passes for a constant.
    """

    @functools.wraps(backward)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_grad_enabled():
            return backward(*args, **kwargs)
        # Compilers trace backward with gradients on, and refuse second derivatives themselves.
        if not torch.compiler.is_compiling():
            raise ConfigError(
                "the backward pass of an MoE layer, or of its model, has no derivative of its own: leave out "
                "create_graph=True, which Hessians and gradient penalties set"
            )
        with torch.no_grad():
            return backward(*args, **kwargs)

    return checked

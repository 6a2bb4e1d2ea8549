"""The C++ library in this process, and its operators for autograd and tracing.

An operator ``x`` has its schema and checks in ``csrc/operators.cpp``; its derivatives are operators of their own,
``x -> x_backward -> x_double_backward``. ``kernels/x/cpp.py`` says the rest, once for each of the three::

    _launch_x = launcher("x")                        # the kernel itself, below autograd

    class _X(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, *rest): ...              # saves tensors, calls _launch_x
        @staticmethod
        def backward(ctx, v): ...                    # calls x_backward(a, rest, v), which is differentiable

    @operator(fake=...)                              # and the fake: empty outputs from the same arguments
    def x(a, rest):                                  # arguments in the schema's order, without defaults
        return _X.apply(a, *rest)

The last Function's backward is ``refuse_third("x")``. Called eagerly, ``x`` is that Function and nothing more; while
``torch.compile`` traces, it is the registered operator, one opaque node, whose autograd formula is the same Function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch

from cxgrad_fast.kernels import building
from cxgrad_fast.printable import one_line

P = ParamSpec("P")
R = TypeVar("R")

NAMESPACE = "cxgrad_fast"

_declared: list[tuple[str, Callable[..., Any] | None, Callable[..., Any]]] = []  # operators: name, formula, fake
_library: torch.library.Library | None = None  # what is registered lives as long as this does


@functools.cache
def load() -> tuple[str, Path | None]:
    """Load the library, building it if need be: why it cannot be had, else no reason and its file."""
    global _library
    try:
        path = building.library()
        torch.ops.load_library(path)
    except (building.BuildError, OSError) as error:
        return one_line(str(error)), None
    _library = torch.library.Library(NAMESPACE, "IMPL")
    for name, formula, fake in _declared:
        if formula is not None:
            _library.impl(name, formula, "Autograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return "", path


def loaded() -> bool:
    """Whether the library is in this process."""
    return _library is not None


def launcher(name: str, *, fake: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """The operator's kernel, without its autograd formula and most of the dispatcher's cost.

    ``fake`` is for an operator that has no formula, which :func:`operator` would declare with it.
    """
    if fake is not None:
        _declared.append((name, None, fake))

    @functools.cache
    def overload() -> Any:
        return getattr(torch.ops.cxgrad_fast, name).default

    def launch(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload()(*args)

    return launch


def operator(*, fake: Callable[..., Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function the autograd formula of the library's operator of the same name, and the way to call it."""

    def declare(formula: Callable[P, R]) -> Callable[P, R]:
        name = formula.__name__
        _declared.append((name, formula, fake))

        @functools.wraps(formula)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if _traced():
                return getattr(torch.ops.cxgrad_fast, name)(*args, **kwargs)
            return formula(*args, **kwargs)

        return call

    return declare


def wanted(ctx: Any, index: int, first: int = 0) -> bool:
    """Whether the running backward pass uses the gradient of the Function's input ``index``.

    The inputs are tensors from the one at ``first`` to that one, and no tensors before.

    ``needs_input_grad`` only says whether it could: a gradient in epsilon alone would still pay for the weight's.
    """
    if not ctx.needs_input_grad[index]:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(ctx.next_functions[index - first][0]))
    except RuntimeError:  # a leaf, of which the engine does not say; or not within a backward pass
        return True


def _traced() -> bool:
    return torch.compiler.is_compiling()


def refuse_third(name: str) -> Callable[..., NoReturn]:
    """The backward of an operator's double backward."""

    def backward(ctx: Any, *cotangents: Any) -> NoReturn:
        raise NotImplementedError(
            f"third derivatives of {NAMESPACE}::{name} are not there; the reference has them (CXGRAD_BACKEND=reference)"
        )

    return backward

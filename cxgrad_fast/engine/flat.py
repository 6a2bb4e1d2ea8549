"""A function of tensors as one flat list of operator calls: what autograd and Python add to them is done once, traced.

The list holds the operators that the function calls, derivatives included, and :mod:`cxgrad_fast.engine.simplify` takes
calls away without a change of bits. It is written as Python source, a line a call, each tensor dropped after its last
use.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from cxgrad_fast.engine.simplify import simplify

Function = Callable[..., Sequence[Tensor]]


class Flat:
    """``function(*inputs)`` for inputs of the shapes and types it was traced with, without autograd.

    Tracing runs the function once. Its results must be tensors that depend on nothing but the inputs: what is read on
    the host while tracing (a shape, a random number, a setting) stays as it was then.

    Attributes:
        calls: operator calls of one run.
        source: the program, for readers.
    """

    def __init__(self, function: Function, inputs: Sequence[Tensor]) -> None:
        module = make_fx(function, tracing_mode="real", _allow_non_fake_inputs=True)(*inputs)
        simplify(module.graph)
        writer = _Writer(module)
        self.source, self.calls = writer.source, writer.calls
        self._run = writer.compiled()

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The function's results, none of which has a graph."""
        with torch._C._AutoDispatchBelowAutograd():  # whatever requires gradients: nothing of it is recorded
            return self._run(*inputs)


class _Writer:
    """The source of a graph's program, and the names that it uses."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.calls = 0
        self._names: dict[str, Any] = {}
        self._known: dict[int, str] = {}
        self._module = module
        nodes = list(module.graph.nodes)
        last = {used: node for node in nodes for used in node.all_input_nodes}
        inputs = [node.name for node in nodes if node.op == "placeholder"]
        lines = [f"def run({', '.join(inputs)}):"]
        for node in nodes:
            lines += [f"    {line}" for line in self._lines(node)]
            done = [used.name for used in node.all_input_nodes if last[used] is node]
            if done and node.op != "output":
                lines.append(f"    del {', '.join(done)}")
        self.source = "\n".join(lines) + "\n"

    def compiled(self) -> Callable[..., list[Tensor]]:
        """The program as a function."""
        scope = dict(self._names)
        exec(compile(self.source, "<flat>", "exec"), scope)
        return scope["run"]

    def _lines(self, node: fx.Node) -> Iterator[str]:
        if node.op == "get_attr":
            yield f"{node.name} = {self._name(getattr(self._module, str(node.target)))}"
        elif node.op == "output":
            yield f"return {self._text(node.args[0])}"
        elif node.target is operator.getitem:
            yield f"{node.name} = {node.args[0]}[{node.args[1]}]"
        elif node.op == "call_function":
            self.calls += 1
            arguments = [self._text(value) for value in node.args]
            arguments += [f"{name}={self._text(value)}" for name, value in node.kwargs.items()]
            function = getattr(node.target, "_op", node.target)  # an overload without Python's part of its call
            yield f"{node.name} = {self._name(function)}({', '.join(arguments)})"

    def _text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return value.name
        if isinstance(value, list | tuple):
            return f"[{', '.join(self._text(part) for part in value)}]"
        if value is None or isinstance(value, bool | int | str):
            return repr(value)
        return self._name(value)  # floats too, infinities among them

    def _name(self, value: Any) -> str:
        """What the source calls an operator, a constant tensor, a number or a type."""
        key = id(value)
        if key not in self._known:
            label = getattr(value, "__name__", "") if callable(value) else ""
            self._known[key] = f"{label.split('.')[0] or 'constant'}_{len(self._known)}"
            self._names[self._known[key]] = value  # which keeps its id its own
        return self._known[key]

"""A function of tensors as one flat list of operator calls: what autograd and Python add to them is done once, traced.

The list holds the very operators that the function calls, derivatives included: it gives the same bits. It is cut to
what the results need and written as Python source, a line a call, each tensor dropped after its last use.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

Function = Callable[..., Sequence[Tensor]]

_aten = torch.ops.aten
_COPIES = (_aten.detach.default, _aten.alias.default, _aten.lift_fresh_copy.default)  # of values nobody writes to


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
        _simplify(module.graph)
        writer = _Writer(module)
        self.source, self.calls = writer.source, writer.calls
        self._run = writer.compiled()

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The function's results, none of which has a graph."""
        with torch._C._AutoDispatchBelowAutograd():  # whatever requires gradients: nothing of it is recorded
            return self._run(*inputs)


def _simplify(graph: fx.Graph) -> None:
    """Drop what no result needs, copies, views that undo each other, and calls that were made before.

    Where the function writes into its tensors, only the first.
    """
    if any(_schema(node) is not None and _schema(node).is_mutable for node in graph.nodes):
        graph.eliminate_dead_code()
        return
    for node in graph.nodes:
        if node.target in _COPIES or _undoes(node):
            source = node.args[0] if node.target in _COPIES else node.args[0].args[0]
            node.replace_all_uses_with(source)
    graph.eliminate_dead_code()
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or "rand" in str(node.target):
            continue
        key = (node.target, _hashable(node.args), _hashable(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _schema(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None)


def _undoes(node: fx.Node) -> bool:
    """Whether the call takes back the view that its argument is."""
    before = node.args[0] if node.args else None
    if not isinstance(before, fx.Node) or before.op != "call_function":
        return False
    if node.target is _aten.squeeze.dim and before.target is _aten.unsqueeze.default:
        rank = before.meta["val"].ndim
        return node.args[1] % rank == before.args[1] % rank
    if node.target is _aten.t.default:
        return before.target is _aten.t.default
    if node.target is _aten.transpose.int and before.target is _aten.transpose.int:
        rank = before.meta["val"].ndim
        return {axis % rank for axis in node.args[1:]} == {axis % rank for axis in before.args[1:]}
    return False


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((name, _hashable(part)) for name, part in sorted(value.items()))
    if isinstance(value, list | tuple):
        return tuple(_hashable(part) for part in value)
    return (type(value), value)  # 1, 1.0 and True are different arguments


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

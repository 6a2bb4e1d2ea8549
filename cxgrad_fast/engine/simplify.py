"""Passes over a traced graph of operator calls that take calls away and leave the results' bits as they are."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from cxgrad_fast.kernels import registration

_aten = torch.ops.aten
_COPIES = (_aten.detach.default, _aten.alias.default, _aten.lift_fresh_copy.default)  # of values nobody writes to
_VIEWS = (_aten.view.default, _aten._unsafe_view.default, _aten.expand.default, _aten.reshape.default)

_SMALL = 1 << 20  # bytes of a tensor that may be kept until several sums are computed in one call


def simplify(graph: fx.Graph) -> None:
    """Drop what no result needs, copies, views that change nothing, and calls made before; join sums.

    Where the function writes into its tensors, only the first.
    """
    if any(_schema(node) is not None and _schema(node).is_mutable for node in graph.nodes):
        graph.eliminate_dead_code()
        return
    for node in graph.nodes:
        source = _source(node)
        if source is not None:
            node.replace_all_uses_with(source)
    _sum_without_axes(graph)
    graph.eliminate_dead_code()
    _drop_repeated(graph)
    if registration.loaded():
        _join_sums(graph)


def _schema(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None)


def _value(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def _source(node: fx.Node) -> fx.Node | None:
    """The node whose value this one's is, in every respect; None where there is no such node."""
    before = node.args[0] if node.args else None
    if node.op != "call_function" or not isinstance(before, fx.Node):
        return None
    if node.target in _COPIES:
        return before
    if node.target in _VIEWS and _is_alike(_value(node), _value(before)):
        return before
    if _undoes(node, before):
        inner = before.args[0]
        assert isinstance(inner, fx.Node)
        return inner
    return None


def _is_alike(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.stride() == b.stride()


def _undoes(node: fx.Node, before: fx.Node) -> bool:
    """Whether the call takes back the view that its argument is."""
    if before.op != "call_function":
        return False
    if node.target is _aten.squeeze.dim and before.target is _aten.unsqueeze.default:
        rank = before.meta["val"].ndim
        return bool(node.args[1] % rank == before.args[1] % rank)
    if node.target is _aten.t.default:
        return before.target is _aten.t.default
    if node.target is _aten.transpose.int and before.target is _aten.transpose.int:
        rank = before.meta["val"].ndim
        return {axis % rank for axis in node.args[1:]} == {axis % rank for axis in before.args[1:]}
    if node.target is _aten.view.default and before.target is _aten.view.default:
        return _is_alike(_value(node), _value(before.args[0]))
    return False


def _sum_without_axes(graph: fx.Graph) -> None:
    """A sum that keeps its axes, and a view without them, as one sum."""
    for node in graph.nodes:
        before = node.args[0] if node.args else None
        if node.target is not _aten.view.default or not isinstance(before, fx.Node):
            continue
        if before.target is not _aten.sum.dim_IntList or len(before.args) != 3 or len(before.users) > 1:
            continue
        axes: Any = before.args[1]
        kept = _value(before).shape
        gone = {axis % len(kept) for axis in axes}
        if tuple(_value(node).shape) == tuple(size for axis, size in enumerate(kept) if axis not in gone):
            node.target, node.args = before.target, (before.args[0], axes, False)


def _drop_repeated(graph: fx.Graph) -> None:
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or "rand" in str(node.target):
            continue
        key = (node.target, _hashable(node.args), _hashable(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _hashable(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((name, _hashable(part)) for name, part in sorted(value.items()))
    if isinstance(value, list | tuple):
        return tuple(_hashable(part) for part in value)
    return (type(value), value)  # 1, 1.0 and True are different arguments


# sums


@dataclass
class _Sum:
    """``((a + b) + c) + ...`` as it stands in a graph.

    Attributes:
        terms: in the order in which they are added.
        node: the last addition.
    """

    terms: list[fx.Node]
    node: fx.Node


def _join_sums(graph: fx.Graph) -> None:
    """Additions of gradients of one tensor as one call, and of several tensors too where they can wait for it.

    The additions keep their order: they give the same bits.
    """
    place = {node: index for index, node in enumerate(graph.nodes)}
    sums = [found for node in graph.nodes if (found := _sum_that_ends(node)) is not None]
    first_use = {id(found): min(place[user] for user in found.node.users) for found in sums}
    by_type: dict[Any, list[_Sum]] = {}
    for found in sums:
        value = _value(found.node)
        by_type.setdefault((value.dtype, value.device), []).append(found)
    nodes, written = list(place), dict[fx.Node, fx.Node]()
    for waiting in by_type.values():
        waiting = sorted(waiting, key=lambda found: first_use[id(found)])
        while waiting:
            at = first_use[id(waiting[0])]
            now = [found for found in waiting if place[found.node] < at]
            waiting = [found for found in waiting if place[found.node] >= at]
            if len(now) > 1 or len(now[0].terms) > 2:
                _write_sums(graph, now, nodes[at], written)
    graph.eliminate_dead_code()


def _sum_that_ends(node: fx.Node) -> _Sum | None:
    """The sum of which this node is the last addition and no part of a longer one."""
    if not _is_addition(node) or not node.users:
        return None
    (user, *others) = node.users
    if not others and _is_addition(user) and user.args[0] is not user.args[1] and _left(user) is node:
        return None
    terms: list[fx.Node] = []
    here = node
    while True:
        left = _left(here)
        right = here.args[1] if here.args[0] is left else here.args[0]
        assert isinstance(right, fx.Node)
        terms.insert(0, right)
        if not (_is_addition(left) and len(left.users) == 1 and left is not right):
            return _Sum([left, *terms], node)
        here = left


def _left(node: fx.Node) -> fx.Node:
    """The operand of an addition that is itself a sum used here alone, if one is; else the first (a + b is b + a)."""
    first, second = node.args[:2]
    assert isinstance(first, fx.Node)
    assert isinstance(second, fx.Node)
    is_sum = [_is_addition(each) and len(each.users) == 1 for each in (first, second)]
    return second if is_sum[1] and not is_sum[0] else first


def _is_addition(node: Any) -> bool:
    """Of two small tensors alike, contiguous in memory."""
    if not isinstance(node, fx.Node) or node.target is not _aten.add.Tensor or node.kwargs or len(node.args) != 2:
        return False
    values = [_value(node), *(_value(each) for each in node.args)]
    return all(_is_alike(values[0], each) and each.dtype == values[0].dtype for each in values) and _is_small(values[0])


def _is_small(value: Tensor) -> bool:
    return value.device.type == "cpu" and value.is_contiguous() and value.nbytes <= _SMALL


def _write_sums(graph: fx.Graph, sums: list[_Sum], before: fx.Node, written: dict[fx.Node, fx.Node]) -> None:
    """One call for ``sums``; ``written`` has the results of those that were written before, which may be terms here."""
    terms = [written.get(term, term) for found in sums for term in found.terms]
    with graph.inserting_before(before):
        call = graph.call_function(torch.ops.cxgrad_fast.sums.default, (terms, [len(found.terms) for found in sums]))
        for index, found in enumerate(sums):
            part = graph.call_function(operator.getitem, (call, index))
            part.meta["val"] = _value(found.node)
            found.node.replace_all_uses_with(part)
            written[found.node] = part

"""Graph modules as plain values: the graph as JSON, the tensors by path.  Nothing is pickled.

What can be written: ``torch.export`` and functional graphs; calls to modules of ``torch.nn`` whose attributes are plain
values; graph modules inside graph modules.  Anything else raises `StoreError` and names it.
"""

from __future__ import annotations

import importlib
import math
import operator
import re
import types
from collections.abc import Mapping, Set
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.graph import CodeGen, _PyTreeCodeGen, _PyTreeInfo
from torch.utils._pytree import SERIALIZED_TYPE_TO_PYTHON_TYPE, treespec_dumps, treespec_loads

from fxopt.errors import StoreError
from fxopt.shapes import propagate

Json = Any
GUARDS = "_guards_fn"  # torch.export's check of the input shapes; a closure that cannot be written


def to_json(gm: GraphModule) -> tuple[Json, dict[str, torch.Tensor]]:
    """
    ``gm`` as plain values, and its tensors by path (tied ones once).

    Raises `StoreError` naming the node or module that cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    return _module_to_json(gm, "", tensors, {}), tensors


def from_json(saved: Json, tensors: dict[str, torch.Tensor]) -> GraphModule:
    """The graph module that `to_json` wrote, with ``tensors`` in it, and the shapes of its values known again."""
    gm = _module_from_json(saved, tensors, {})
    assert isinstance(gm, GraphModule)
    inputs = _fake_inputs(saved["graph"]["inputs"])
    if inputs is not None:
        propagate(gm, inputs)
    return gm


# --- modules --------------------------------------------------------------------------------------------------------


def _module_to_json(module: nn.Module, path: str, tensors: dict[str, torch.Tensor], seen: dict[int, str]) -> Json:
    prefix = f"{path}." if path else ""
    state = []
    for kind, store in (("parameter", module._parameters), ("buffer", module._buffers)):
        for name, tensor in store.items():
            entry: dict[str, Any] = {"kind": kind, "name": name}
            if kind == "buffer" and name in module._non_persistent_buffers_set:
                entry["persistent"] = False
            if tensor is None:
                entry["none"] = True
            else:
                entry["tensor"] = seen.setdefault(id(tensor), prefix + name)
                entry["requires_grad"] = tensor.requires_grad
                tensors[entry["tensor"]] = tensor.detach()
            state.append(entry)
    children = {
        name: _module_to_json(child, prefix + name, tensors, seen)
        for name, child in module._modules.items()
        if child is not None and name != GUARDS
    }
    saved: dict[str, Any] = {"training": module.training, "state": state, "children": children}
    if isinstance(module, GraphModule):
        return saved | {"graph": _graph_to_json(module)}
    return saved | _class_to_json(module, path)


_SKIPPED = frozenset({"training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_fxopt_owner"})


def _class_to_json(module: nn.Module, path: str) -> Json:
    kind = type(module)
    if not kind.__module__.startswith("torch.nn.modules"):
        if kind is nn.Module:
            return {"class": "torch.nn.modules.module:Module", "attributes": {}}
        raise StoreError(
            f"{path} is a {kind.__qualname__}, which cannot be written without pickle; "
            "capture the model with fxopt.capture, whose graphs hold no modules"
        )
    attributes = {}
    for name, value in module.__dict__.items():
        if name in _SKIPPED or (isinstance(value, dict) and not value):
            continue
        if name.endswith("_hooks") or name.startswith("_is_full"):
            if value:
                raise StoreError(f"{path} has hooks, which cannot be written; remove them before saving")
            continue
        attributes[name] = encode(value, f"{path}.{name}")
    return {"class": f"{kind.__module__}:{kind.__qualname__}", "attributes": attributes}


def _module_from_json(saved: Json, tensors: dict[str, torch.Tensor], made: dict[str, torch.Tensor]) -> nn.Module:
    if "graph" in saved:
        module = nn.Module()
    else:
        kind = find(saved["class"])
        if not (
            isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__.startswith("torch.nn.modules")
        ):
            raise StoreError(f"{saved['class']} is no module of torch.nn; the file is damaged or from elsewhere")
        module = kind.__new__(kind)
        nn.Module.__init__(module)
        for name, value in saved["attributes"].items():
            module.__dict__[name] = decode(value, {})
    for entry in saved["state"]:
        _put_state(module, entry, tensors, made)
    for name, child in saved["children"].items():
        module.add_module(name, _module_from_json(child, tensors, made))
    if "graph" in saved:
        module = _graph_module(module, saved["graph"])
    module.training = saved["training"]
    return module


def _put_state(module: nn.Module, entry: Json, tensors: dict[str, torch.Tensor], made: dict[str, torch.Tensor]) -> None:
    name, tensor = entry["name"], None
    if not entry.get("none"):
        if entry["tensor"] not in tensors:
            raise StoreError(f"the tensor {entry['tensor']} is missing; the saved weights do not belong to this graph")
        key = f"{entry['kind']} {entry['tensor']}"
        tensor = made.get(key)
        if tensor is None:
            tensor = tensors[entry["tensor"]]
            if entry["kind"] == "parameter":
                tensor = nn.Parameter(tensor, requires_grad=entry["requires_grad"])
            made[key] = tensor
    if entry["kind"] == "parameter":
        module._parameters[name] = tensor  # type: ignore[assignment]
    else:
        module.register_buffer(name, tensor, persistent=entry.get("persistent", True))


def _graph_module(holder: nn.Module, saved: Json) -> GraphModule:
    graph = _graph_from_json(saved)
    gm = GraphModule(holder, graph)
    for store, own in (
        (holder._parameters, gm._parameters),
        (holder._buffers, gm._buffers),
        (holder._modules, gm._modules),
    ):
        own.clear()  # all of them, in their order, not only those that nodes read
        own.update(store)  # type: ignore[arg-type]
    gm._non_persistent_buffers_set = set(holder._non_persistent_buffers_set)
    return gm


# --- graphs ---------------------------------------------------------------------------------------------------------


def _graph_to_json(gm: GraphModule) -> Json:
    nodes = []
    for node in gm.graph.nodes:
        if node.op == "call_module" and node.target == GUARDS:
            continue
        where = f"the node {node.name}"
        entry = {
            "name": node.name,
            "op": node.op,
            "target": target_name(node),
            "args": [encode(a, where) for a in node.args],
            "kwargs": {k: encode(v, where) for k, v in node.kwargs.items()},
        }
        if stack := node.meta.get("nn_module_stack"):
            entry["modules"] = [[k, str(p), str(t)] for k, (p, t) in stack.items()]
        if trace := node.meta.get("stack_trace"):
            entry["source"] = trace
        nodes.append(entry)
    inputs = [_spec(n) for n in gm.graph.nodes if n.op == "placeholder"]
    return {"nodes": nodes, "codegen": _codegen_to_json(gm.graph._codegen), "inputs": inputs}


def _graph_from_json(saved: Json) -> Graph:
    graph = Graph()
    nodes: dict[str, Node] = {}
    for entry in saved["nodes"]:
        target: Any = entry["target"]
        if entry["op"] == "call_function":
            target = _function(target)
        args = tuple(decode(a, nodes) for a in entry["args"])
        kwargs = {k: decode(v, nodes) for k, v in entry["kwargs"].items()}
        node = graph.create_node(entry["op"], target, args, kwargs, name=entry["name"])
        node.name = entry["name"]
        if "modules" in entry:
            node.meta["nn_module_stack"] = {k: (p, t) for k, p, t in entry["modules"]}
        if "source" in entry:
            node.meta["stack_trace"] = entry["source"]
        nodes[node.name] = node
    graph._codegen = _codegen_from_json(saved["codegen"])
    return graph


def _codegen_to_json(codegen: Any) -> Json:
    if type(codegen) is CodeGen:
        return None
    if not isinstance(codegen, _PyTreeCodeGen):
        raise StoreError(f"the graph writes its code with {type(codegen).__qualname__}, which cannot be written")
    info = codegen.pytree_info
    outer = None if info.out_spec is None else treespec_dumps(info.out_spec)
    return {"arguments": list(info.orig_args), "in": treespec_dumps(info.in_spec), "out": outer}


def _codegen_from_json(saved: Json) -> CodeGen:
    if saved is None:
        return CodeGen()
    outer = None if saved["out"] is None else _spec_loads(saved["out"])
    return _PyTreeCodeGen(_PyTreeInfo(saved["arguments"], _spec_loads(saved["in"]), outer))


def _spec_loads(text: str) -> Any:
    for name in set(_TYPE.findall(text)) - SERIALIZED_TYPE_TO_PYTHON_TYPE.keys():
        _register(name)
    return treespec_loads(text)


_TYPE = re.compile(r'"type": "(transformers\.[\w.]+[.:]\w+)"')


def _register(name: str) -> None:
    """Make a class of transformers a container of tensors, by the name that a specification of values has for it."""
    module, _, kind = name.replace(":", ".").rpartition(".")
    found = find(f"{module}:{kind}")  # which registers those that are outputs of models
    if name not in SERIALIZED_TYPE_TO_PYTHON_TYPE and isinstance(found, type):
        exporter = importlib.import_module("transformers.exporters.exporter_dynamo")
        if exporter.is_cache_class(found):
            exporter.register_pytree_node(found)


def target_name(node: Node) -> str:
    """The target of a node as a text that leads back to it."""
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, OpOverload):
        return f"op:{node.target.namespace}.{node.target._opname}.{node.target._overloadname}"
    name = _function_name(node.target)
    if name is None:
        raise StoreError(f"the node {node.name} calls {node.target}, which cannot be found again by name")
    return name


_HOMES = (torch, torch.nn.functional, operator, math, torch._C._nn)


def _function_name(function: Any) -> str | None:
    name = getattr(function, "__name__", "")
    for home in _HOMES:
        if getattr(home, name, None) is function:
            return f"{home.__name__}:{name}"
    module = getattr(function, "__module__", None)
    qualified = getattr(function, "__qualname__", name)
    if module is not None and "<" not in qualified and find(f"{module}:{qualified}", missing=True) is function:
        return f"{module}:{qualified}"
    return None


def _function(text: str) -> Any:
    if text.startswith("op:"):
        namespace, name, overload = text[3:].split(".")
        try:
            return getattr(getattr(getattr(torch.ops, namespace), name), overload)
        except AttributeError as error:
            raise StoreError(f"no operator {text[3:]} is registered; import the package that defines it") from error
    found = find(text)
    if not callable(found):
        raise StoreError(f"{text} is no function; the file is damaged or from elsewhere")
    return found


def find(text: str, missing: bool = False) -> Any:
    """What ``module:name`` names; a StoreError (or None, if ``missing`` is fine) where there is nothing."""
    module, _, name = text.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        if missing:
            return None
        raise StoreError(f"{text} cannot be imported ({error}); install what defines it") from error
    return found


# --- values ---------------------------------------------------------------------------------------------------------

_NAMED = (torch.dtype, torch.layout, torch.memory_format)


def encode(value: Any, where: str) -> Json:
    """``value`` as JSON; a StoreError names ``where`` it stands if it cannot be written."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, _NAMED):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, slice):
        return {"slice": [encode(v, where) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, tuple):
        return {"tuple": [encode(v, where) for v in value]}
    if isinstance(value, list):
        return [encode(v, where) for v in value]
    if isinstance(value, dict):
        return {"dict": [[encode(k, where), encode(v, where)] for k, v in value.items()]}
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType | type) and (name := _function_name(value)):
        return {"function": name}
    raise StoreError(f"{where} holds {value!r:.60}, a {type(value).__qualname__}, which cannot be written as JSON")


def decode(value: Json, nodes: Mapping[str, Node] = MappingProxyType({})) -> Any:
    """The value that `encode` wrote."""
    if isinstance(value, list):
        return [decode(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    match kind:
        case "node":
            return nodes[held]
        case "float":
            return float(held)
        case "complex":
            return complex(*held)
        case "torch":
            return getattr(torch, held)
        case "device":
            return torch.device(held)
        case "ellipsis":
            return ...
        case "slice":
            return slice(*(decode(v, nodes) for v in held))
        case "tuple":
            return tuple(decode(v, nodes) for v in held)
        case "dict":
            return {decode(k, nodes): decode(v, nodes) for k, v in held}
        case "function":
            return _function(held)
    raise StoreError(f"{kind!r} is no kind of value; the file was written by another version of fxopt")


# --- shapes of the inputs -------------------------------------------------------------------------------------------


def _spec(placeholder: Node) -> Json:
    """Shape (dynamic sizes by their symbol, with the size seen), dtype and device of an input."""
    val = placeholder.meta.get("val")
    if not isinstance(val, torch.Tensor):
        return None
    shape: list[Any] = []
    for size in val.shape:
        if isinstance(size, torch.SymInt) and size.node.expr.is_number:  # a symbol that was found to be one size
            shape.append(int(size))
        elif isinstance(size, torch.SymInt):
            hint = size.node.hint
            shape.append([str(size), hint if isinstance(hint, int) else 7])
        else:
            shape.append(size)
    return {"shape": shape, "dtype": str(val.dtype).removeprefix("torch."), "device": str(val.device)}


def _fake_inputs(specs: list[Json]) -> tuple[Any, ...] | None:
    """Fake tensors for the inputs; sizes of one symbol are one symbol again.  None where an input is not known."""
    if any(s is None for s in specs):
        return None
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    hints: dict[str, int] = {}
    static = {size for spec in specs for size in spec["shape"] if isinstance(size, int)}
    fakes: list[torch.Tensor] = []
    for spec in specs:
        sizes, dynamic = [], []
        for size in spec["shape"]:
            if isinstance(size, list):  # equal hints are one symbol: give each symbol a hint of its own
                if size[0] not in hints:
                    hints[size[0]] = _unused(size[1], static | {*hints.values()})
                sizes.append(hints[size[0]])
                dynamic.append(DimDynamic.DUCK)
            else:
                sizes.append(size)
                dynamic.append(DimDynamic.STATIC)
        real = torch.empty(sizes, dtype=getattr(torch, spec["dtype"]), device="meta")
        context: Any = StatelessSymbolicContext(dynamic_sizes=dynamic)
        fake = mode.from_tensor(real, symbolic_context=context)
        with mode:
            fakes.append(torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=spec["device"]))
    return tuple(fakes)


def _unused(hint: int, taken: Set[int]) -> int:
    hint = max(hint, 2)  # 0 and 1 are specialised
    while hint in taken:
        hint += 1
    return hint

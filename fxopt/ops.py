"""How an operation is declared, read from a node, and written as a node, whichever dialect a graph is in.

An operation (`Op`) is declared once, by the signature of a decorated stub, with its spellings: an ``nn.Module``
class (its attributes are the arguments), a function, the name of a tensor method, or an ATen overload.  The
declarations are in `fxopt.vocabulary`; this file is the mechanism, and what follows from it: which nodes write to
which tensors, which may alias, and which do nothing but compute.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import _side_effectful_functions

if TYPE_CHECKING:
    from fxopt.pattern import Apply

Dialect = Literal["module", "function", "aten"]


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED = _Required()


@dataclass(frozen=True)
class Attr:
    """A parameter or buffer of the graph module, by its path, that no node reads yet."""

    path: str

    def __repr__(self) -> str:
        return self.path


# What a call's positional and keyword arguments are, put as the target's signature has them; None: another operation's
Arrange = Callable[[tuple[Any, ...], Mapping[str, Any]], tuple[tuple[Any, ...], Mapping[str, Any]] | None]


@dataclass(frozen=True, eq=False)
class Spelling:
    """One target that means an operation, with the operation's parameter behind each of its own positions."""

    target: Any
    own: tuple[str, ...]  # its own parameters
    positions: tuple[tuple[str | None, Any], ...]  # (parameter of the operation, or None if ignored; own default)
    keywords: Mapping[str, str | None]  # own name -> parameter of the operation, or None if ignored
    keyword_only: frozenset[str]  # own names
    fixed: Mapping[str, Any]
    inplace: bool
    variadic: str | None  # the parameter that takes all further positional arguments, as in x.view(2, 3)
    dialect: Dialect
    attributes: Callable[[nn.Module], dict[str, Any] | str] | None  # of a module; a string says why not
    arrange: Arrange | None = None
    must: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # own name -> the values that mean nothing
    translate: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)  # name -> (own value, the operation's)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
        """The arguments by the operation's names; None where the call says something the operation cannot."""
        if self.arrange is not None:
            arranged = self.arrange(args, kwargs)
            if arranged is None:
                return None
            args, kwargs = arranged
        at = self._variadic_at
        if at is not None and len(args) > at and not isinstance(args[at], list | tuple):
            args = (*args[:at], tuple(args[at:]))
        if len(args) > self._most:
            return None
        if self.must:
            spoken = {**dict(zip(self.own, args, strict=False)), **kwargs}
            if any(n in spoken and not any(_same(spoken[n], v) for v in values) for n, values in self.must.items()):
                return None
            kwargs = {n: v for n, v in kwargs.items() if n not in self.must}
        bound = dict(self._unsaid)
        for name, value in zip(self._names, args, strict=False):
            if name is not None:
                bound[name] = value
        for own, value in kwargs.items():
            if own not in self.keywords:
                return None
            if (name := self.keywords[own]) is not None:
                bound[name] = value
        for name in self._required:
            if bound[name] is REQUIRED:
                return None
        for name, (own_value, value) in self.translate.items():
            if _same(bound.get(name), own_value):
                bound[name] = value
        return bound

    def say(self, arguments: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and keyword arguments that call the target with ``arguments``, its own defaults unsaid."""
        positional: list[Any] = []
        said: dict[str, Any] = {}
        open_ = True
        for own_name, (name, own_default) in zip(self.own, self.positions, strict=True):
            if name is None and own_default is REQUIRED:
                value = self.must[own_name][0]
            elif name is None or name not in arguments:
                open_ = False
                continue
            else:
                own_value, operations = self.translate.get(name, (REQUIRED, REQUIRED))
                value = own_value if _same(arguments[name], operations) else arguments[name]
            value = value if self.target is operator.getitem else _plain(value)
            if own_default is not REQUIRED and _same(_frozen(value), own_default):
                open_ = False
            elif open_ and own_name not in self.keyword_only:
                positional.append(value)
            else:
                said[own_name] = value
        return tuple(positional), said

    # Every read of a node passes here, so what does not depend on the call is worked out once.

    @functools.cached_property
    def _variadic_at(self) -> int | None:
        if not self.variadic:
            return None
        return next((i for i, name in enumerate(self._names) if name == self.variadic), None)

    @functools.cached_property
    def _names(self) -> tuple[str | None, ...]:
        return tuple(name for name, _ in self.positions)

    @functools.cached_property
    def _most(self) -> int:
        return len(self.own) - len(self.keyword_only)

    @functools.cached_property
    def _unsaid(self) -> dict[str, Any]:
        return {name: default for name, default in self.positions if name is not None} | dict(self.fixed)

    @functools.cached_property
    def _required(self) -> tuple[str, ...]:
        return tuple(name for name, default in self._unsaid.items() if default is REQUIRED)


@dataclass(frozen=True)
class Call:
    """What a node computes, in the vocabulary: an operation and all its arguments by name."""

    op: Op
    dialect: Dialect
    arguments: dict[str, Any]
    inplace: bool = False


@dataclass(frozen=True, eq=False)
class Op:
    """
    One operation of the vocabulary.

    ``commutative``: the first two arguments may be swapped.  ``view``: the result may share memory with the first
    argument.  ``random``: draws from a generator (asked with the arguments).  ``writes``: the parameters that the
    operation writes to besides what an in-place spelling writes (asked with the arguments).  ``effect``: is there for
    something else than its value, as an assertion is.
    """

    name: str
    signature: inspect.Signature
    spellings: list[Spelling] = field(default_factory=list, repr=False)
    commutative: bool = False
    view: bool = False
    random: Callable[[Mapping[str, Any]], bool] | None = None
    writes: Callable[[Mapping[str, Any]], tuple[str, ...]] | None = None
    effect: bool = False
    normalize: Callable[[dict[str, Any]], None] | None = None
    build: Callable[..., nn.Module] | None = None  # a module from (arguments with tensors in place of paths)

    @functools.cached_property
    def parameters(self) -> tuple[str, ...]:
        return tuple(n for n in self.signature.parameters if n != "inplace")  # that one is a property of the call

    @functools.cached_property
    def defaults(self) -> dict[str, Any]:
        empty = inspect.Parameter.empty
        defaults = {n: p.default for n, p in self.signature.parameters.items() if n != "inplace"}
        return {n: REQUIRED if d is empty else d for n, d in defaults.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Apply:
        """A pattern: this operation applied to patterns.  What is left out must have its default."""
        from fxopt.pattern import Apply  # the pattern language is built of operations

        return Apply(self, dict(self.signature.bind(*args, **kwargs).arguments))

    def __repr__(self) -> str:
        return self.name

    def spelling(self, dialect: Dialect, arguments: Mapping[str, Any]) -> Spelling:
        """The spelling to write ``arguments`` in: that of ``dialect``, or another where it has none that fits."""
        full = self.defaults | dict(arguments)
        candidates = [s for s in self.spellings if s.dialect != "module" and not s.inplace and _says(s, self, full)]
        if not candidates:
            raise TypeError(f"{self.name} has no function that takes {dict(arguments)}")
        order = ("aten", "function", "method") if dialect == "aten" else ("function", "method", "aten")
        return min(candidates, key=lambda s: (not _fits(s, full), order.index(_kind(s))))  # the first declared of these

    def emit(self, graph: Graph, dialect: Dialect, *args: Any, **kwargs: Any) -> Node:
        """Write this operation at the insert point of ``graph`` in ``dialect``, leaving defaults unsaid."""
        arguments = dict(self.signature.bind(*args, **kwargs).arguments)
        arguments.pop("inplace", None)
        spelling = self.spelling(dialect, arguments)
        positional, said = spelling.say({n: v for n, v in (self.defaults | arguments).items() if v is not REQUIRED})
        if isinstance(spelling.target, str):
            return graph.call_method(spelling.target, positional, said)
        return graph.call_function(spelling.target, positional, said)


VOCABULARY: dict[Any, list[tuple[Op, Spelling]]] = {}  # several only where the arguments tell which


def spell(
    target: Any,
    names: str | None = None,
    *,
    inplace: bool = False,
    attributes: Callable[[nn.Module], dict[str, Any] | str] | None = None,
    arrange: Arrange | None = None,
    must: Mapping[str, tuple[Any, ...]] | None = None,
    translate: Mapping[str, tuple[Any, Any]] | None = None,
    variadic: str | None = None,
    **fixed: Any,
) -> Callable[[Op], Spelling]:
    """
    A target whose own parameters differ from the operation's.

    ``names``: the operation's parameter behind each own parameter, in order, separated by blanks; ``_`` ignores one.
    Where torch cannot tell a target's own parameters (builtin functions, methods), they are these names (or
    ``own=name``; with a ``!`` where the target has no default), or else all of the operation's.
    ``attributes``: for a module class, its arguments; or a string that says why a module cannot be read.
    ``arrange``: brings positional and keyword arguments into the order of ``names``; None if the call means
    another operation.
    ``must``: own parameters that are ignored at these values, and not read at others.
    ``translate``: parameter -> (what the target says, what the operation says), as -1 and None for no padding.
    ``variadic``: the parameter that takes all further positional arguments (a method's sizes do by themselves).
    ``fixed``: parameters of the operation that this target implies.
    """

    def make(op: Op) -> Spelling:
        own, keyword_only = _own_parameters(target) or _as_declared(op, target, names, fixed)
        known_names = tuple(op.signature.parameters)
        if names is not None:
            canonical = [n.rpartition("=")[2].rstrip("!") for n in names.split()]
        else:
            canonical = [n for n in known_names if n not in fixed and (n != "inplace" or any(o == n for o, _ in own))]
        positions: list[tuple[str | None, Any]] = []
        keywords: dict[str, str | None] = {}
        if isinstance(target, str) or _own_parameters(target) is None:
            keywords = {"input": op.parameters[0], "self": op.parameters[0]} if op.parameters else {}
        for i, (own_name, default) in enumerate(own):
            name = canonical[i] if i < len(canonical) else "_"
            known = None if name == "_" else name
            if known is not None and known not in known_names:
                raise ValueError(f"{op.name} has no parameter {known!r}; {target} wants one of {known_names}")
            positions.append((known, _frozen(default)))
            keywords[own_name] = known
        dialect: Dialect = "function"
        if inspect.isclass(target):
            dialect = "module"
        elif isinstance(target, OpOverload):
            dialect = "aten"
        first_sequence = next((n for n in op.parameters if n in _SEQUENCES), None)
        return Spelling(
            target,
            tuple(n for n, _ in own),
            tuple(positions),
            keywords,
            keyword_only,
            fixed,
            inplace,
            first_sequence if isinstance(target, str) and variadic is None else variadic,
            dialect,
            attributes,
            arrange,
            must or {},
            translate or {},
        )

    return make


_SEQUENCES = ("size", "shape", "dims", "repeats")  # parameters that a method takes as separate arguments too


def op(
    *spellings: Any,
    inplace: tuple[Any, ...] = (),
    commutative: bool = False,
    view: bool = False,
    random: Callable[[Mapping[str, Any]], bool] | None = None,
    writes: Callable[[Mapping[str, Any]], tuple[str, ...]] | None = None,
    effect: bool = False,
    normalize: Callable[[dict[str, Any]], None] | None = None,
    build: Callable[..., nn.Module] | None = None,
) -> Callable[[Callable[..., Any]], Op]:
    """Declare an operation: the decorated stub is its signature, ``spellings`` the targets that mean it."""

    def declare(stub: Callable[..., Any]) -> Op:
        new = Op(
            stub.__name__.rstrip("_"),
            inspect.signature(stub),
            commutative=commutative,
            view=view,
            random=random,
            writes=writes,
            effect=effect,
            normalize=normalize,
            build=build,
        )
        for target in (*spellings, *inplace):
            made = target(new) if getattr(target, "__qualname__", "") == "spell.<locals>.make" else None
            spelled = made or spell(target, inplace=target in inplace)(new)
            if made is not None and target in inplace and not made.inplace:
                spelled = replace(made, inplace=True)
            known = VOCABULARY.setdefault(spelled.target, [])
            if known and (spelled.arrange is None or known[-1][1].arrange is None):
                raise ValueError(f"{spelled.target} already spells {known[0][0].name!r}, not {new.name!r}")
            known.append((new, spelled))
            new.spellings.append(spelled)
        return new

    return declare


def read(gm: GraphModule, node: Node) -> Call | None:
    """Read ``node`` in the vocabulary, or return None if the vocabulary has no word for it."""
    found = _read(gm, node)
    return found if isinstance(found, Call) else None


def unread(gm: GraphModule, node: Node) -> tuple[Op, str] | None:
    """The operation that ``node`` looks like and why it cannot be read as one; None where there is no such doubt."""
    found = _read(gm, node)
    return found if isinstance(found, tuple) else None


def operation(gm: GraphModule, node: Node) -> tuple[Op | None, str | None]:
    """The operation that ``node`` computes or looks like, and in the second case why it cannot be read as that."""
    found = _read(gm, node)
    return found if isinstance(found, tuple) else (found.op if found is not None else None, None)


def _read(gm: GraphModule, node: Node) -> Call | tuple[Op, str] | None:
    if node.op == "call_module":
        return _read_module(gm, node)
    if node.op not in ("call_function", "call_method"):
        return None
    words = VOCABULARY.get(node.target)
    if words is None:
        return None
    for meaning, spelling in words:
        bound = spelling.bind(node.args, node.kwargs)
        if bound is not None:
            return _call(meaning, spelling, bound)
    return words[0][0], f"{node} has arguments outside the vocabulary: {node.args}, {dict(node.kwargs)}"


def _call(meaning: Op, spelling: Spelling, bound: dict[str, Any]) -> Call | None:
    arguments: dict[str, Any] = {}
    for name, default in meaning.defaults.items():
        value = bound.get(name, default)
        if value is REQUIRED:
            return None
        arguments[name] = _frozen(value) if isinstance(value, list | tuple) else value
    if meaning.normalize is not None:
        meaning.normalize(arguments)
    first = meaning.parameters[0] if meaning.parameters else None
    if meaning.commutative and not _is_tensor(arguments[first or ""]):  # 2 * x is x * 2
        a, b = meaning.parameters[:2]
        if _is_tensor(arguments[b]):
            arguments[a], arguments[b] = arguments[b], arguments[a]
    inplace = spelling.inplace or bound.get("inplace", False) is True
    if inplace and meaning.view and meaning.random is not None and not meaning.random(arguments):
        inplace = False  # dropout outside of training returns its argument, and writes nothing
    return Call(meaning, spelling.dialect, arguments, inplace)


def _read_module(gm: GraphModule, node: Node) -> Call | tuple[Op, str] | None:
    module = submodule(gm, str(node.target))
    if module is None:
        return None
    words = VOCABULARY.get(type(module))  # exact type: a subclass may compute something else
    if words is None:
        return _near_miss(module, str(node.target))
    meaning, spelling = words[0]
    if hooked(module):
        return meaning, f"{node.target} has hooks"
    said = spelling.attributes(module) if spelling.attributes is not None else _attributes(meaning, module)
    if isinstance(said, str):
        return meaning, f"{node.target} {said}"
    taken = [n for n in meaning.parameters if n not in said]
    if len(node.args) > len(taken) or any(k not in ("input", *taken) for k in node.kwargs):
        return meaning, f"{node} passes arguments that {type(module).__name__} does not take"
    arguments: dict[str, Any] = dict(zip(taken, node.args, strict=False))
    arguments |= {taken[0] if k == "input" else k: v for k, v in node.kwargs.items()}
    for name, value in said.items():
        arguments[name] = _attr_of(module, str(node.target), value)
    return _call(meaning, spelling, arguments)


def _near_miss(module: nn.Module, path: str) -> tuple[Op, str] | None:
    for base in type(module).__mro__[1:]:
        if base is not nn.Module and base in VOCABULARY:
            return VOCABULARY[base][0][0], f"{path} is a {type(module).__name__}, a subclass of {base.__name__}"
    return None


def _attributes(meaning: Op, module: nn.Module) -> dict[str, Any]:
    names = tuple(meaning.signature.parameters)[1:]
    return {n: getattr(module, n) for n in names if hasattr(module, n)}


def _attr_of(module: nn.Module, path: str, value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    for store in (module._parameters, module._buffers):
        for name, held in store.items():
            if held is value:
                return Attr(f"{path}.{name}")
    raise TypeError(f"{path} computes with a tensor that is neither its parameter nor its buffer")


def hooked(module: nn.Module) -> bool:
    """Whether calling ``module`` does more than its class says: hooks, or a ``forward`` of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def submodule(gm: nn.Module, path: str) -> nn.Module | None:
    """The submodule at ``path``, or None."""
    module: Any = gm
    for name in path.split(".") if path else ():
        module = getattr(module, name, None)
    return module if isinstance(module, nn.Module) else None


def constant(gm: GraphModule, value: Any) -> torch.Tensor | None:
    """The tensor behind an `Attr` or a ``get_attr`` node; None for anything that is not fixed in the graph module."""
    if isinstance(value, Attr):
        path = value.path
    elif isinstance(value, Node) and value.op == "get_attr":
        path = str(value.target)
    else:
        return None
    owner, _, name = path.rpartition(".")
    found = getattr(submodule(gm, owner), name, None)
    return found if isinstance(found, torch.Tensor) else None


# --- effects ------------------------------------------------------------------------------------------------------


def writes(gm: GraphModule, node: Node) -> tuple[Node, ...]:
    """The nodes whose tensor ``node`` writes to, or may write to where the vocabulary does not know it."""
    call = read(gm, node)
    if call is not None:
        written = [call.arguments[n] for n in (call.op.writes(call.arguments) if call.op.writes else ())]
        if call.inplace:
            written.append(call.arguments[call.op.parameters[0]])
        return tuple(n for n in written if isinstance(n, Node))
    if node.op in ("placeholder", "get_attr", "output"):
        return ()
    if isinstance(node.target, OpOverload):
        return _written_by_schema(node)
    if node.op == "call_function" and _harmless_function(node.target):
        return tuple(n for n in _flat(node.kwargs.get("out")) if isinstance(n, Node))
    if node.op == "call_module" and type(submodule(gm, str(node.target))).__name__ == "GuardsFn":
        return ()  # torch.export's own check of the inputs
    if node.op == "call_method" and _harmless_method(str(node.target)):
        return ()
    return tuple(node.all_input_nodes)


def effectful(gm: GraphModule, node: Node) -> bool:
    """Whether ``node`` does anything besides computing its value: writes, draws random numbers, asserts, or unknown."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "get_attr":
        return False
    if node.target in _side_effectful_functions and node.target not in _FALSELY_EFFECTFUL:
        return True
    call = read(gm, node)
    if call is not None:
        draws = call.op.effect or (call.op.random is not None and call.op.random(call.arguments))
        return bool(draws or call.inplace or (call.op.writes and call.op.writes(call.arguments)))
    if isinstance(node.target, OpOverload):
        named = node.target._schema.name.rpartition("::")[2]
        random = torch.Tag.nondeterministic_seeded in node.target.tags
        return node.target._schema.is_mutable or random or named.startswith(("_assert", "sym_constrain"))
    if node.op == "call_function":
        return not _harmless_function(node.target) or "out" in node.kwargs
    if node.op == "call_method":
        return not _harmless_method(str(node.target))
    return True  # a module that the vocabulary does not know


# torch calls these impure because a generator or a dropout mask may be involved; the vocabulary asks the arguments.
_FALSELY_EFFECTFUL = frozenset(
    t for n in ("scaled_dot_product_attention", "dropout") for t in (getattr(torch.ops.aten, n).default,)
)


def _written_by_schema(node: Node) -> tuple[Node, ...]:
    schema = cast(OpOverload, node.target)._schema
    if not schema.is_mutable:
        return ()
    found: list[Node] = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
        found += [value] if isinstance(value, Node) else [v for v in _flat(value) if isinstance(v, Node)]
    return tuple(found)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for v in value:
            yield from _flat(v)
    else:
        yield value


_INPLACE_OPERATORS = frozenset(
    getattr(operator, n)
    for n in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul")
) | {operator.setitem, operator.delitem}


@functools.cache
def _harmless_function(target: Any) -> bool:
    """A function of torch, of the operator module or a builtin, whose name does not end in an underscore."""
    if isinstance(target, OpOverloadPacket):
        return False
    if target in _INPLACE_OPERATORS or target in _side_effectful_functions:
        return False
    name, module = getattr(target, "__name__", "_"), getattr(target, "__module__", None) or ""
    if target is getattr:
        return True
    if any(target is getattr(builtins, n, None) for n in ("print", "setattr", "delattr", "exec", "eval", "input")):
        return False
    known = module.split(".")[0] in ("torch", "math", "builtins") or module in ("_operator", "operator")
    random = name in ("rand", "randn", "randint", "bernoulli", "multinomial", "normal", "poisson", "randperm")
    return known and not name.endswith("_") and not random and not name.startswith(("rand", "_assert"))


_METHODS_WITH_EFFECT = frozenset(
    ("backward", "register_hook", "register_post_accumulate_grad_hook", "retain_grad", "bernoulli", "multinomial")
)


def _harmless_method(name: str) -> bool:
    return hasattr(torch.Tensor, name) and not name.endswith("_") and name not in _METHODS_WITH_EFFECT


def may_alias(gm: GraphModule, node: Node) -> Node:
    """The node whose memory ``node`` may share, followed through views to where the memory came from."""
    while True:
        source = shares(gm, node)
        if not isinstance(source, Node):
            return node
        node = source


def shares(gm: GraphModule, node: Node) -> Any:
    """The input that ``node`` may be a view of: for what the vocabulary does not know, the first."""
    if node.op in ("placeholder", "get_attr", "output"):
        return None
    call = read(gm, node)
    if call is not None:
        return call.arguments[call.op.parameters[0]] if call.op.view or call.inplace else None
    if isinstance(node.target, OpOverload) and not _returns_alias(node.target):
        return None
    return next(iter(node.all_input_nodes), None)


@functools.cache
def _returns_alias(target: OpOverload) -> bool:
    return any(r.alias_info is not None for r in target._schema.returns)


# --- small things -------------------------------------------------------------------------------------------------


def _frozen(value: Any) -> Any:
    """Lists as tuples, so that every dialect's arguments compare alike."""
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return tuple(_frozen(v) for v in value)
    return value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Node | Attr)


def _own_parameters(target: Any) -> tuple[list[tuple[str, Any]], frozenset[str]] | None:
    """The target's own parameters with their defaults, and those that are keyword-only; None if it does not say."""
    if isinstance(target, OpOverload):
        own = [(a.name, a.default_value if a.has_default_value() else REQUIRED) for a in target._schema.arguments]
        return own, frozenset(a.name for a in target._schema.arguments if a.kwarg_only)
    if isinstance(target, str) or inspect.isclass(target) or getattr(target, "__module__", "") == "_operator":
        return None
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return None
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return None
    own = [(p.name, REQUIRED if p.default is p.empty else p.default) for p in parameters]
    return own, frozenset(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


def _as_declared(
    op: Op, target: Any, names: str | None, fixed: Mapping[str, Any]
) -> tuple[list[tuple[str, Any]], frozenset[str]]:
    """The same for a target that torch says nothing about: it is called as the operation is declared."""
    declared = names.split() if names is not None else [n for n in op.parameters if n not in fixed]
    if getattr(target, "__module__", "") == "_operator":
        declared = declared[: len(inspect.signature(target).parameters)]
    kinds = {n: p.kind for n, p in op.signature.parameters.items()}
    own, keyword_only = [], set()
    for word in declared:
        own_name, _, name = word.rstrip("!").rpartition("=")
        own.append((own_name or name, REQUIRED if word.endswith("!") else op.defaults.get(name, REQUIRED)))
        if kinds.get(name) is inspect.Parameter.KEYWORD_ONLY:
            keyword_only.add(own_name or name)
    return own, frozenset(keyword_only)


def _kind(spelling: Spelling) -> str:
    return "method" if isinstance(spelling.target, str) else spelling.dialect


def _says(spelling: Spelling, meaning: Op, arguments: Mapping[str, Any]) -> bool:
    """Whether the spelling can express these arguments, which are all of the operation's."""
    names = {name for name, _ in spelling.positions}
    implied = meaning.defaults | dict(spelling.fixed)
    return all(_same(v, implied[n]) for n, v in arguments.items() if n not in names)


def _fits(spelling: Spelling, arguments: Mapping[str, Any]) -> bool:
    """Whether tensors stand where an overload wants tensors, and numbers where it wants numbers."""
    if (isinstance(spelling.target, str) or spelling.inplace) and not _is_tensor(
        arguments[str(spelling.positions[0][0])]
    ):
        return False
    if not isinstance(spelling.target, OpOverload):
        return True
    schema = spelling.target._schema.arguments
    return all(
        _takes(argument, arguments[name])
        for (name, _), argument in zip(spelling.positions, schema, strict=True)
        if name is not None and arguments.get(name, REQUIRED) is not REQUIRED
    )


def _takes(argument: torch.Argument, value: Any) -> bool:
    kind = str(argument.type)
    if kind.startswith("Optional["):
        kind = kind[len("Optional[") : -1]
        if value is None:
            return True
    if kind.startswith("List[") != isinstance(value, tuple | list):
        return False
    numbers = int | float | torch.SymInt | torch.SymFloat
    number = isinstance(value, Node) and isinstance(value.meta.get("val"), numbers)
    if kind == "Tensor":
        return _is_tensor(value) and not number
    return value is not None and (number or not _is_tensor(value))

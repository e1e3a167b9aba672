"""What nobody uses need not be computed."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import GraphModule

from fxopt.delta import graphs
from fxopt.pattern import Miss
from fxopt.transformation import ReversibleTransformation, sweep
from fxopt.transformations._memory import effect


@dataclass(frozen=True)
class EliminateDeadNodes(ReversibleTransformation):
    """
    y = f(x), y unused  ->  nothing

    Exact.  Removes the parameters, buffers and modules that only dead operations read, too.  Keeps the graph's inputs,
    and whatever has an effect besides its value: a write in place, random numbers drawn, an assertion (torch.export's
    ``_guards_fn`` among them), a module that the vocabulary cannot read.
    """

    preserves_computation = True

    def transform(self, graph_module: GraphModule) -> None:
        inner = graphs(graph_module)  # all at once, for one graph may read what belongs to another
        unread = {path: _erase_dead(gm) for path, gm in inner.items()}
        for path, gm in inner.items():
            others = {
                f"{other}.{n.target}".lstrip(".")
                for other, reader in inner.items()
                if other != path and unread[path]
                for n in reader.graph.nodes
                if n.op in ("get_attr", "call_module")
            }
            sweep(gm, {p for p in unread[path] if not _reads(others, path, p)})

    def misses(self, gm: GraphModule) -> Iterator[Miss]:
        """The nodes that nobody uses but that have an effect."""
        for inner in graphs(gm).values():
            for node in inner.graph.nodes:
                found = effect(inner, node) if not node.users else None
                if found is not None:
                    yield Miss(node, found.reason)


def _erase_dead(gm: GraphModule) -> set[str]:
    """Erase the dead nodes of ``gm``; the paths of what dead operations read."""
    paths = set()
    for node in reversed(list(gm.graph.nodes)):
        if node.users or node.op in ("placeholder", "output") or effect(gm, node) is not None:
            continue
        if node.op == "call_module":
            paths.add(str(node.target))
        paths |= {str(n.target) for n in node.all_input_nodes if n.op == "get_attr"}
        gm.graph.erase_node(node)
    return paths


def _reads(targets: set[str], graph: str, path: str) -> bool:
    """Whether one of ``targets`` is what stands at ``path`` in ``graph``, is inside it or holds it."""
    whole = f"{graph}.{path}".lstrip(".")
    return any(
        t == whole or t.startswith(f"{whole}.") or (whole.startswith(f"{t}.") and t.startswith(f"{graph}."))
        for t in targets
    )

"""How a law is asked of many random graphs, the same ones in every run."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck

from fxopt.errors import TransformationError
from fxopt.history import history
from fxopt.snapshot import graphs
from fxopt.transformation import Transformation
from fxopt.watch import own
from tests.graphs import DIALECTS, Case, cases
from tests.laws.passes import EDITS, catalogue, optimums, sparse
from tests.laws.portrait import outputs, portrait

EXAMPLES = hypothesis.settings().max_examples
ASKED: dict[str, int] = {}  # law -> graphs that it is asked of

OWN, OPTIMUMS = catalogue(), optimums()


def law(times: float = 1) -> Callable[[Callable[[str, Any], None]], Any]:
    """
    A test that asks the decorated law of ``times`` FXOPT_EXAMPLES random graphs in each dialect.

    The draws depend on the law's name, the dialect and FXOPT_SEED alone.
    """

    def decorate(body: Callable[[str, Any], None]) -> Any:
        count = max(1, int(EXAMPLES * times))
        ASKED[body.__name__] = count * len(DIALECTS)

        @pytest.mark.parametrize("dialect", DIALECTS)
        def test(dialect: str) -> None:
            seen = 0

            @hypothesis.seed(zlib.crc32(f"{body.__name__} {dialect} {os.environ.get('FXOPT_SEED', '')}".encode()))
            @hypothesis.settings(
                max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck)
            )
            @hypothesis.given(st.data())
            def examples(data: Any) -> None:
                nonlocal seen
                body(dialect, data)
                seen += 1

            examples()
            assert seen >= count, f"{body.__name__} was asked of {seen} graphs, expected {count}"

        test.__name__, test.__doc__ = body.__name__, body.__doc__
        return test

    return decorate


def drawn(data: Any, dialect: str, **options: Any) -> tuple[Case, Any]:
    """A random case and its graph module, which owns its modules already."""
    case = data.draw(cases((dialect,), **options), label="case")
    gm = case.trace()
    own(gm)
    return case, gm


class Said:
    """Stands for a transformation; shows as its signature, in one line."""

    def __init__(self, transformation: Transformation) -> None:
        self.transformation = transformation

    def __repr__(self) -> str:
        return self.transformation.signature


def edits(kinds: tuple[Any, ...] = EDITS) -> st.SearchStrategy[Said]:
    return st.builds(lambda kind, pick: Said(kind(pick)), st.sampled_from(kinds), st.integers(0, 11))


OURS = st.sampled_from([Said(t) for t in (*OWN, *sparse())])
ANY = st.one_of(OURS, edits(), edits(), st.sampled_from([Said(t) for t in OPTIMUMS]))


def some(data: Any, strategy: st.SearchStrategy[Said], least: int, most: int) -> list[Transformation]:
    """A random sequence of transformations."""
    found = data.draw(st.lists(strategy, min_size=least, max_size=most), label="transformations")
    return [f.transformation for f in found]


def applied(gm, transformations):
    """Those of ``transformations`` that could be applied, applied."""
    found = []
    for t in transformations:
        try:
            t(gm)
        except TransformationError:
            continue
        found.append(t)
    return found


def same(gm: Any, before: Any, bits: Any = None, case: Case | None = None) -> None:
    """Assert that ``gm`` is as ``before`` says, and computes ``bits``."""
    assert not (found := portrait(gm).differences(before)), "\n".join(found)
    if case is not None:
        assert outputs(gm, case.inputs) == bits


def shown(gm: Any) -> str:
    return "\n".join(f"{p}: {inner.graph}" for p, inner in graphs(gm).items()) + f"\n{history(gm)!r}"

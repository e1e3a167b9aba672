"""Law 7: a copy is a copy."""

from __future__ import annotations

import copy
import io
import pickle

import hypothesis.strategies as st
import torch

from fxopt.delta import share
from fxopt.errors import FxoptError
from fxopt.history import history, undo
from fxopt.snapshot import graphs
from tests.laws.asking import ANY, applied, drawn, law, same, shown, some
from tests.laws.portrait import outputs, portrait


def pickled(gm):
    return pickle.loads(pickle.dumps(gm))


def saved(gm):
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": saved, "share": share}


def alike(a, b):
    """Whether two graph modules are the same but for their objects, and for what of `meta` cannot be pickled."""
    first, second = portrait(a, objects=False), portrait(b, objects=False)
    return [d for d in first.differences(second) if not d.startswith("metas")]


@law()
def test_a_copy_keeps_the_history_and_is_undone_on_its_own(dialect, data):
    case, gm = drawn(data, dialect)
    how = data.draw(st.sampled_from(sorted(COPIES)), label="how")
    if how in ("pickle", "torch.save"):  # what a pass is told of shapes cannot be pickled, and it does more where told
        for node in (n for inner in graphs(gm).values() for n in inner.graph.nodes):
            node.meta = {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta", "example_value")}
    before = portrait(gm, objects=False)
    applied(gm, some(data, ANY, 1, 4))
    if history(gm) and history(gm)[-1].rewrites and data.draw(st.booleans(), label="undo one"):
        history(gm)[-1].rewrites[0].reverse()
    made, bits, text = portrait(gm), outputs(gm, case.inputs), shown(gm)
    if how in ("pickle", "torch.save") and not picklable(gm):
        return
    twin = COPIES[how](gm)
    same(gm, made)
    found = alike(gm, twin)
    assert not found, "\n".join([*found, text])
    assert repr(history(twin)) == repr(history(gm)) and outputs(twin, case.inputs) == bits
    while history(twin):  # the same undos do the same to both, and neither touches the other
        index = data.draw(st.integers(0, len(history(twin)) - 1), label="undo")
        now = portrait(gm)
        errors = []
        for one in (twin, gm):
            try:
                undo(one, index)
            except FxoptError as error:
                errors.append(str(error))
            if one is twin:
                same(gm, now)
        assert len(errors) in (0, 2) and len(set(errors)) < 2, errors
        found = alike(gm, twin)
        assert not found, "\n".join([*found, text])
        if errors:
            break
    if not history(twin) and how in ("deepcopy", "share"):
        found = portrait(twin, objects=False).differences(before)
        assert not found, "\n".join([*found, text])


def picklable(gm):
    """Whether torch can pickle what the graph module holds, history aside."""
    plain = copy.copy(gm.__dict__)
    try:
        pickle.dumps({k: v for k, v in plain.items() if k not in ("_graph", "meta", "_code")})
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True

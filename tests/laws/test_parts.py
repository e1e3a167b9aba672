"""Law 3, of single rewrites, of edits from outside in between, and of what cannot be made again."""

from __future__ import annotations

import operator

import hypothesis.strategies as st
import torch
from torch import nn

from fxopt.errors import Conflict, TransformationError
from fxopt.history import history, undo
from tests.graphs import twin
from tests.laws.asking import ANY, OURS, applied, drawn, edits, law, same, shown, some
from tests.laws.passes import BypassOnce
from tests.laws.portrait import outputs, portrait


@law()
def test_rewrites_are_undone_and_made_again_alone(dialect, data):
    """Law 3: one by one, in any order, down to the graph module without the commit, and back."""
    case, gm = drawn(data, dialect)
    before = portrait(gm)
    applied(gm, some(data, ANY, 1, 3))
    after, bits = portrait(gm), outputs(gm, case.inputs)
    index = data.draw(st.integers(0, max(0, len(history(gm)) - 1)), label="commit")
    rewrites = history(gm)[index].rewrites if history(gm) else ()
    last = index == len(history(gm)) - 1
    for i in data.draw(st.permutations(range(len(rewrites))), label="order"):
        if last or not history(gm)[index].rewrites[i : i + 1]:
            rewrites[i].reverse()
            assert not rewrites[i].active
            assert all(n.op == "output" or n.users is not None for n in gm.graph.nodes)
    for i in data.draw(st.permutations(range(len(rewrites))), label="again") if last else ():
        rewrites[i].apply()
        assert rewrites[i].active
    same(gm, after, bits, case)
    if last and rewrites:
        chosen = data.draw(st.sets(st.integers(0, len(rewrites) - 1)), label="left undone")
        for i in chosen:
            rewrites[i].reverse()
        outputs(gm, case.inputs)
    while history(gm):
        undo(gm, len(history(gm)) - 1)
    same(gm, before)


@law()
def test_rewrites_stay_undone_under_other_changes(dialect, data):
    """Law 3: what was undone alone stays undone when what lies under it is undone and it is made again."""
    _, gm = drawn(data, dialect)
    before = portrait(gm)
    done = applied(gm, some(data, ANY, 2, 4))
    if len(done) < 2 or not history(gm)[-1].rewrites:
        return
    rewrites = history(gm)[-1].rewrites
    rewrite = rewrites[data.draw(st.integers(0, len(rewrites) - 1), label="rewrite")]
    rewrite.reverse()
    now = portrait(gm)
    try:
        undo(gm, 0)
    except (Conflict, TransformationError):
        same(gm, now)
        return
    alike = [r for r in history(gm)[-1].rewrites if r.part.id == rewrite.part.id]
    assert all(not r.active for r in alike)
    while history(gm):
        undo(gm, 0)
    same(gm, before)


# --- edits from outside


def at_the_input(gm, k):
    first = next(n for n in gm.graph.nodes if n.op == "placeholder")
    with gm.graph.inserting_after(first):
        new = gm.graph.create_node("call_function", torch.neg, (first,), name=f"foreign_{k}")
    first.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def at_the_output(gm, k):
    output = gm.graph.output_node()
    first = output.all_input_nodes[0]
    with gm.graph.inserting_before(output):
        new = gm.graph.create_node("call_function", torch.neg, (first,), name=f"foreign_{k}")
    output.replace_input_with(first, new)


def a_node_beside(gm, k):
    first = next(n for n in gm.graph.nodes if n.op == "placeholder")
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.create_node("call_function", operator.add, (first, k), name=f"foreign_{k}")


def a_parameter(gm, k):
    gm.register_parameter(f"foreign_{k}", nn.Parameter(torch.ones(4)))
    gm.register_buffer(f"foreign_buffer_{k}", torch.ones(4), persistent=False)


def a_flag(gm, k):
    gm.note = f"foreign {k}"  # never what a pass writes: an edit that changes nothing cannot be told
    next(iter(gm.graph.nodes)).meta["note"] = f"foreign {k}"


OUTSIDE = (at_the_input, at_the_output, a_node_beside, a_parameter, a_flag)


@law()
def test_edits_from_outside_are_kept(dialect, data):
    """Law 3: undoing under them leaves them as if they had been made without the commit, or refuses at once."""
    _, gm = drawn(data, dialect, max_steps=6)
    other, before = twin(gm), portrait(gm)
    steps, theirs = [], set()
    for t in some(data, ANY, 1, 4):
        steps += [("commit", t)] if applied(gm, [t]) else []
        if data.draw(st.booleans(), label="edit"):
            edit = data.draw(st.sampled_from(OUTSIDE), label="how")
            there = set(gm.graph.nodes)
            edit(gm, len(steps))
            theirs |= {*gm.graph.nodes} - there
            steps.append((edit, len(steps)))
            gm.recompile()
    made = [i for i, (kind, _) in enumerate(steps) if kind == "commit"]
    if not made:
        return
    i = data.draw(st.sampled_from(made), label="undo")
    now, text, graph = portrait(gm), shown(gm), gm.graph
    held = {n.name: n for n in gm.graph.nodes if n in theirs}  # a pass may have put others in their place since,
    held = {name: n for name, n in held.items() if name.startswith("foreign")}  # or given one another name
    try:
        undo(gm, made.index(i))
    except (Conflict, TransformationError):
        same(gm, now)
        return
    there = all(held.get(n.name, n) is n for n in gm.graph.nodes)  # no node can go to another graph
    assert there or gm.graph is not graph, "a node of somebody else's edit is another object now"
    for j, (kind, what) in enumerate(steps):
        if j != i:
            what(other) if kind == "commit" else kind(other, what)
    other.recompile()
    if not any(kind is at_the_input for kind, _ in steps):  # which takes other users where there are others
        found = portrait(gm, objects=False).differences(portrait(other, objects=False))
        told = "\n".join([*found, "--- from", text, "--- left", shown(gm), "--- wanted", shown(other)])
        assert not found, told
    if len(made) == len(steps):
        undo_all(gm)
        same(gm, before)


def undo_all(gm):
    while history(gm):
        undo(gm, 0)


@law()
def test_what_cannot_be_made_again_is_undone_in_place_or_not_at_all(dialect, data):
    """Law 3, where a later transformation needed data: exact once all is undone, in whatever order."""
    case, gm = drawn(data, dialect)
    before, bits = portrait(gm), outputs(gm, case.inputs)
    applied(gm, some(data, st.one_of(OURS, edits(), edits((BypassOnce,))), 2, 4))
    for _ in range(12):
        if not history(gm):
            break
        now, index = portrait(gm), data.draw(st.integers(0, len(history(gm)) - 1), label="undo")
        try:
            undo(gm, index)
        except Conflict as error:
            assert "undo" in str(error)
            same(gm, now)
        except TransformationError:
            same(gm, now)
    while history(gm):
        undo(gm, len(history(gm)) - 1)
    same(gm, before, bits, case)

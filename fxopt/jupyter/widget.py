"""The stepper's front end: a slider, buttons and the diff beside them, by anywidget."""

from __future__ import annotations

import html
import importlib.util
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

from fxopt.errors import FxoptError
from fxopt.jupyter.stepper import Stepper

_FOLDER = Path(__file__).parent


def step_through(gm: GraphModule, example_inputs: Any = None) -> View:
    """
    Step through the history of ``gm`` in a notebook: a slider over its rewrites, the diff of each, undo and apply,
    verification and timing at any point (these need ``example_inputs``), and a bisection by hand.

    Without anywidget (``pip install "fxopt[notebook]"``), or where nothing shows widgets, it is static HTML. The
    result's ``stepper`` does the same from code.
    """
    return View(Stepper(gm, example_inputs))


class View:
    """What a notebook shows of a `Stepper`."""

    def __init__(self, stepper: Stepper) -> None:
        self.stepper = stepper
        self.widget = _connect(stepper) if importlib.util.find_spec("anywidget") is not None else None

    def _repr_mimebundle_(self, **options: Any) -> Any:
        fallback = {"text/plain": repr(self), "text/html": self.stepper.static_html()}
        if self.widget is None:
            return fallback
        shown = self.widget._repr_mimebundle_(**options)
        if isinstance(shown, tuple):
            return fallback | shown[0], shown[1]
        return fallback | (shown or {})

    def __repr__(self) -> str:
        return self.stepper.status()


def _connect(stepper: Stepper) -> Any:
    """A widget that shows ``stepper``, and lets its buttons drive it."""
    import anywidget
    import traitlets

    class Front(anywidget.AnyWidget):
        """The synchronised state; see widget.js."""

        _esm = _FOLDER / "widget.js"
        _css = _FOLDER / "widget.css"
        position = traitlets.Int(0).tag(sync=True)
        last = traitlets.Int(0).tag(sync=True)
        labels = traitlets.List(traitlets.Unicode()).tag(sync=True)
        marks = traitlets.Dict().tag(sync=True)
        status = traitlets.Unicode().tag(sync=True)
        answer = traitlets.Unicode().tag(sync=True)
        diff = traitlets.Unicode().tag(sync=True)
        active = traitlets.Bool(True).tag(sync=True)
        questions = traitlets.Bool(False).tag(sync=True)

    front = Front(
        last=stepper.last,
        labels=["before the first commit", *(f"{p.signature} · {p.name}" for p in stepper.positions)],
        questions=stepper.inputs is not None,
    )
    show(stepper, front)
    front.on_msg(lambda _, content, __: handle(stepper, front, content))
    return front


def handle(stepper: Stepper, front: Any, content: dict[str, Any]) -> None:
    """Do what a button or the slider asks for: ``{"do": "go" | "toggle" | "verify" | "time" | "good" | "bad"}``."""
    try:
        answer = _do(stepper, content)
    except FxoptError as error:
        answer = f"<p class='fxopt-error'>{html.escape(str(error))}</p>"
    show(stepper, front, answer)


def _do(stepper: Stepper, content: dict[str, Any]) -> str:
    """Carries out one request; what it answers, as HTML."""
    match content.get("do"):
        case "go":
            stepper.go(int(content["position"]))
        case "toggle":
            stepper.toggle()
        case "verify":
            return stepper.verify()._repr_html_()
        case "time":
            return stepper.time()._repr_html_()
        case "good":
            stepper.mark("good")
        case "bad":
            stepper.mark("bad")
    return ""


def show(stepper: Stepper, front: Any, answer: str = "") -> None:
    """Bring what is shown up to date."""
    rewrite = stepper.rewrite
    with front.hold_sync():
        front.position = stepper.at
        front.status = stepper.status()
        front.diff = stepper.html()
        front.active = rewrite is None or rewrite.active
        front.marks = {str(p): m for p, m in stepper.marks.items()}
        front.answer = answer

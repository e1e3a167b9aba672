"""The page: the template, its style and script, the data, and plotly, all in one text."""

from __future__ import annotations

import base64
import functools
import gzip
import json
from importlib.resources import files
from typing import Any

import plotly.offline
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

import fxopt
from fxopt.report.data import Subject, report_data


def page(subject: Subject) -> str:
    """The report of ``subject`` as HTML."""
    found = report_data(subject)
    folder = files("fxopt.report")
    # what the template shows is escaped; the style and the script are ours
    environment = Environment(loader=FileSystemLoader(str(folder)), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"ratio": _ratio, "error": _error, "mib": _mib, "verdict": _verdict}
    return environment.get_template("report.html.jinja").render(
        data=found,
        versions=f"fxopt {fxopt.__version__}, torch {torch.__version__}",
        style=Markup((folder / "report.css").read_text(encoding="utf-8")),
        script=Markup((folder / "report.js").read_text(encoding="utf-8")),
        json=Markup(in_script(found)),
        plotly=Markup(_plotly()),
    )


def in_script(value: Any) -> str:
    """
    ``value`` as JSON that can stand in a script element, whatever its strings hold.

    Nothing in it ends the element or opens a comment, and all of it is ASCII, line separators included.
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@functools.cache
def _plotly() -> str:
    """plotly.js, packed: the browser unpacks it when the first plot comes into view."""
    return base64.b64encode(gzip.compress(plotly.offline.get_plotlyjs().encode(), 9, mtime=0)).decode()


def _ratio(comparison: Any) -> str:
    if comparison is None:
        return ""
    low, high = comparison["interval"]
    interval = "too few rounds" if high is None else f"{low:.2f}, {high:.2f}"
    return f"{comparison['ratio']:.2f} [{interval}]"


def _verdict(comparison: Any) -> str:
    return "" if comparison is None else str(comparison["verdict"]).replace(" ", "-")


def _error(verification: Any) -> str:
    if verification is None:
        return ""
    worst = verification["max_error"]
    return "0" if worst == 0 else f"{worst:.1e}" if isinstance(worst, float) else str(worst)


def _mib(comparison: Any) -> str:
    if comparison is None or comparison["memory"] is None:
        return ""
    before, after = (f"{value / 2**20:.3g}" for value in comparison["memory"])
    return after if before == after else f"{before} → {after}"

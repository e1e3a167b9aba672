import json
import subprocess
import sys

import pytest

from fxopt import catalogue, transformations
from fxopt.errors import StoreError, UsageError
from fxopt.transformation import Transformation

CATALOGUE = catalogue.catalogue()


def test_every_pass_of_the_folder_is_exported():
    from pathlib import Path

    folder = Path(transformations.__file__).parent
    files = {p.stem for p in folder.glob("*.py") if not p.stem.startswith("_")}
    assert files == {kind.__module__.rpartition(".")[2] for kind in CATALOGUE.values()}


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_pass_tells_its_equation(name):
    assert "->" in catalogue.equation(CATALOGUE[name]), "a pass's docstring begins with its equation"
    assert catalogue.summary(CATALOGUE[name])


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_pass_survives_json(name):
    made = CATALOGUE[name]()
    again = catalogue.from_json(json.loads(json.dumps(catalogue.to_json(made))))
    assert again == made and again.signature == made.signature


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_signature_is_a_spelling(name):
    made = CATALOGUE[name]()
    assert catalogue.parse(made.signature) == [made]


def test_signatures_are_equal_in_every_process():
    code = "from fxopt.catalogue import catalogue; print([k().signature for k in catalogue().values()])"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert found.strip() == str([k().signature for k in CATALOGUE.values()])


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("EliminateDropuot", "did you mean EliminateDropout"),
        ("EliminateDropout(x=1)", "EliminateDropout does not take x; its options are: none"),
        ("EliminateDropout(", "is no list of passes"),
        ("EliminateDropout(1)", "is no pass; write NAME"),
        ("EliminateDropout(x=open('f'))", "an option is no plain value"),
        ("1 + 1", "is no pass"),
    ),
)
def test_a_wrong_spelling_is_one_line(text, message):
    with pytest.raises(UsageError, match=message.replace("(", r"\(").replace(")", r"\)")) as caught:
        catalogue.parse(text)
    assert "\n" not in str(caught.value)


def test_a_name_that_is_like_none_gets_no_suggestion():
    with pytest.raises(UsageError) as caught:
        catalogue.parse("xyzzy")
    assert str(caught.value) == "no pass is called 'xyzzy'; `fxopt passes` lists them"


@pytest.mark.parametrize("device_type", ("cpu", "cuda"))
def test_default_may_stand_in_a_list(device_type):
    passes = catalogue.parse("EliminateDropout,default,MergeLinears", device_type)
    kinds = transformations.EliminateDropout(), *catalogue.default(device_type), transformations.MergeLinears()
    assert passes == [*kinds]


@pytest.mark.parametrize(
    ("entry", "message"),
    (
        ({"class": "no.such:Thing", "options": {}}, "cannot be imported"),
        ({"class": "os:system", "options": {}}, "is no fxopt transformation"),
    ),
)
def test_a_journal_from_elsewhere_is_refused(entry, message):
    with pytest.raises(StoreError, match=message):
        catalogue.from_json(entry)


def test_an_option_that_is_no_plain_value_cannot_be_saved():
    class Holds(Transformation):
        def __init__(self, value):
            self.value = value

        def transform(self, graph_module):
            return None

    with pytest.raises(StoreError, match="which is no plain value"):
        catalogue.to_json(Holds(object()))

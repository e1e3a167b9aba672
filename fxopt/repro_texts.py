"""The texts that a reproducer's `repro.py` is made of (`string.Template`)."""

AGAIN = "the failure shows again"
FLAKY = "the check gives several answers for the same graph"

HEAD = '''"""
$title

Needs torch and fxopt alone.  Exit code 1: the failure shows again; 0: it does not; 2: it could not be tried.
"""

import json
import sys
import traceback
from pathlib import Path

import fxopt
import fxopt.kernels  # registers the operators that a graph may call
import torch
from fxopt.serial import decode, from_json
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent


def graph(name):
    """A graph module: name.json with its tensors, those that both graphs read and its own."""
    tensors = load_file(HERE / "weights.safetensors") | load_file(HERE / f"{name}.safetensors")
    return from_json(json.loads((HERE / f"{name}.json").read_text()), tensors)

'''
TAIL = """

if __name__ == "__main__":
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 2
    sys.exit(code)
"""
INPUTS = '''
def inputs():
    """The inputs in order, tensors (with the strides that they had) and numbers."""
    tensors, found = load_file(HERE / "inputs.safetensors"), []
    for entry in json.loads((HERE / "inputs.json").read_text()):
        value = tensors[entry["tensor"]] if "tensor" in entry else decode(entry["value"])
        if "stride" in entry:
            value = torch.empty_strided(value.shape, entry["stride"], dtype=value.dtype).copy_(value)
        found.append(value)
    return tuple(found)

'''
COMPARE = '''
def main():
    """Hold the graph after the rewrite against the graph before it."""
    from fxopt.checks import failure_of

    before, after = graph("before"), graph("after")
    found = fxopt.verify(before, after, inputs(), n_drawn=0, rtol=$rtol, atol=$atol)
    failures = [failure_of(d) for d in found.outputs if not d.ok]
    again = [f for f in failures if f.kind == $kind]
    print(again[0].text if again else found.summary)
    print("$again" if again else "the failure does not show")
    return 1 if again else 0
'''
TIME = '''
def main():
    """Time the graph after the rewrite against the graph before it."""
    before, after = graph("before"), graph("after")
    found = fxopt.benchmark(before, after, inputs(), memory=False)
    again = found.interval[0] > $threshold
    print(found.summary)
    print("$again" if again else "the failure does not show")
    return 1 if again else 0
'''
PASS = '''
def main():
    """Apply the transformation to the graph on which it raised."""
    from fxopt.reproduce import read_transformation

    transformation = read_transformation(json.loads((HERE / "transformation.json").read_text()))
    try:
        transformation(graph("before"))
    except fxopt.errors.TransformationError as error:
        print(error)
        again = isinstance(error, fxopt.errors.IrreversibleEdit) or type(error.__cause__).__name__ == $kind
        print("$again" if again else "the failure does not show")
        return 1 if again else 0
    print("the failure does not show")
    return 0
'''
CALL = '''
def ask(name):
    """What the check says of one of the graphs."""
    from fxopt.serial import find

    try:
        said = find($check)(graph(name))
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
        return "bad"
    return "cannot tell" if said is None else "good" if said else "bad"

'''
SCRIPT = '''
def ask(name):
    """What the script says of one of the graphs."""
    import os
    import subprocess

    where = $folder if os.path.isdir($folder) else None
    environment = {**os.environ, "FXOPT_GRAPH": str(HERE / name)}
    code = subprocess.run($command, shell=True, env=environment, cwd=where).returncode
    return "good" if code == 0 else "cannot tell" if code == 125 else "bad" if 0 < code < 128 else f"exit code {code}"

'''
ASK = '''
def main():
    """Ask the check that bisected of the graph without the rewrite and of the graph with it, $times times each."""
    answers = {name: [ask(name) for _ in range($times)] for name in ("before", "after")}
    for name, given in answers.items():
        if len(set(given)) > 1:
            print(f"$flaky: {', '.join(given)} ({name})", file=sys.stderr)
            return 2
    if answers["before"][0] != "good":
        said = answers["before"][0]
        print(f"the check says {said} of the graph without the rewrite, so it tells nothing here", file=sys.stderr)
        return 2
    again = answers["after"][0] == "bad"
    print("the check says", answers["after"][0])
    print("$again" if again else "the failure does not show")
    return 1 if again else 0
'''

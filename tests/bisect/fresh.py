"""Reproducers in a fresh process, one for all of them: most of the time that it takes is for importing torch."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUNNER = """
import contextlib, io, json, runpy, sys
told = {}
for folder in sys.argv[1:]:
    sys.path.insert(0, folder)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            runpy.run_path(folder + "/repro.py", run_name="__main__")
        except SystemExit as stop:
            told[folder] = stop.code, said.getvalue().splitlines()
    sys.path.remove(folder)
print(json.dumps(told))
"""


def rerun(*folders, cwd=None):
    """The exit code of the `repro.py` in each folder, and the lines that it printed."""
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, *map(str, folders)],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    print(done.stderr)  # shown where a test fails
    assert done.returncode == 0
    told = json.loads(done.stdout.splitlines()[-1])
    return [told[str(folder)] for folder in folders]

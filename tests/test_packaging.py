"""The wheel a user gets: it holds every pass, whether it is built from the tree or from the sdist, and it imports."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fxopt

# One worker, so that the distributions are built once.
pytestmark = pytest.mark.xdist_group("packaging")

ROOT = Path(__file__).parent.parent
NATIVE = {".c", ".cpp", ".h", ".inc"}  # the sources of the native kernels
SOURCES = {"fxopt": ROOT / "fxopt", "transformations": ROOT / "transformations"}


def run(*command: str | os.PathLike[str], cwd: Path, **environment: str) -> str:
    """Standard output of a command that has to succeed; its standard error is part of the failure."""
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tree_modules() -> set[str]:
    """Every Python file of the package in the tree, as a path inside the wheel."""
    files = set()
    for name, folder in SOURCES.items():
        inside = "fxopt" if name == "fxopt" else "fxopt/transformations"
        for path in folder.rglob("*.py"):
            relative = path.relative_to(folder)
            if name == "transformations" or relative.parts[0] != "transformations":
                files.add(f"{inside}/{relative.as_posix()}")
    return files


@pytest.fixture(scope="module")
def declared() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def quick_compilers(folder: Path) -> dict[str, str]:
    """
    The compilers, told not to optimise: it takes three times as long, and no test here runs a kernel.

    That the kernels build as they are shipped is seen where the package is installed to be tested.
    """
    found = {}
    for variable, usual in (("CC", "cc"), ("CXX", "c++")):
        script = folder / usual
        script.write_text(f'#!/bin/sh\nexec {os.environ.get(variable, usual)} "$@" -O0\n')  # the last -O counts
        script.chmod(0o755)
        found[variable] = str(script)
    return found


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """The sdist, and the wheel that was built from that sdist rather than from the tree."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    compilers = quick_compilers(tmp_path_factory.mktemp("compilers"))
    # `git archive` would miss files not yet committed; git decides here only what is ignored.
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in listed:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=source, **compilers)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def test_package_list_is_the_tree(declared):
    packages = {path.rsplit("/", 1)[0].replace("/", ".") for path in tree_modules() if path.endswith("/__init__.py")}
    assert set(declared["options"]["packages"].split()) == packages
    inner = {path.rsplit("/", 1)[0] for path in tree_modules()}
    assert {name.replace("/", ".") for name in inner} == packages, "a folder of modules has no __init__.py"


def test_symlink_leads_to_the_catalogue():
    link = ROOT / "fxopt" / "transformations"
    assert link.is_symlink()
    assert os.readlink(link) == "../transformations"


def test_catalogue_has_one_name():
    refused = subprocess.run([sys.executable, "-c", "import transformations"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "write `import fxopt.transformations`" in refused.stderr


def test_version_is_declared_once(declared):
    assert declared["metadata"]["version"] == "attr: fxopt.__version__"
    assert f"## {fxopt.__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_constraints_pin_every_dependency(declared):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {line.split("==")[0].lower() for line in lines if not line.startswith("#")}
    assert all("==" in line and "+" not in line for line in lines if not line.startswith("#"))
    wanted = declared["options"]["install_requires"] + declared["options.extras_require"]["dev"]
    names = [re.split(r"[>=;\s]", line)[0].lower() for line in wanted.splitlines() if line]
    assert set(names) <= pins


def test_sdist_holds_the_sources(distributions):
    sdist, _ = distributions
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    expected = {path.relative_to(ROOT).as_posix() for path in SOURCES["transformations"].rglob("*.py")}
    assert expected <= names
    assert {"LICENSE", "setup.cfg", "setup.py", "pyproject.toml", "fxopt/py.typed"} <= names
    kernels = {p.relative_to(ROOT).as_posix() for p in SOURCES["fxopt"].rglob("*") if p.suffix in NATIVE}
    assert kernels <= names
    assert not [name for name in names if name.endswith(".so")]


def test_wheel_from_sdist_holds_every_module(distributions):
    _, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if name.endswith(".py")} == tree_modules()
    assert "fxopt/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_holds_every_data_file(distributions):
    _, wheel = distributions
    data = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES["fxopt"].rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc", ".so", *NATIVE} and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert data <= names
    assert not [name for name in names if Path(name).suffix in NATIVE], "the sources of the kernels belong in the sdist"


def test_wheel_holds_the_kernels_and_they_load(distributions, tmp_path):
    _, wheel = distributions
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler here: nothing to build the kernels with")
    assert "-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    program = "from fxopt.kernels import native as n; print(n.__file__, n.why_not(), n.library().fxopt_best_isa() >= 0)"
    file, *rest = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(tmp_path)).split()
    assert Path(file).is_relative_to(tmp_path)
    assert rest == ["None", "True"]


@pytest.mark.slow
def test_wheel_without_a_compiler(distributions, tmp_path):
    sdist, _ = distributions
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    build = (sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path / "dist")
    run(*build, cwd=source, CC="/no/cc", CXX="/no/c++")
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = "from fxopt.kernels import native; print(native.library(), native.isa(), native.why_not())"
    said = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert said.startswith("None none the native kernels were not built; install a C++ compiler")


def test_wheel_declares_its_entry_points(distributions):
    _, wheel = distributions
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        entry_points = archive.read(name).decode()
    assert "[console_scripts]\nfxopt = fxopt.cli:main" in entry_points
    assert "[torch_dynamo_backends]\nfxopt = fxopt.huggingface:dynamo_backend" in entry_points


def test_wheel_imports_from_another_folder(distributions, tmp_path):
    _, wheel = distributions
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    program = (
        "import fxopt, fxopt.transformations as t, pkgutil, importlib\n"
        "for module in pkgutil.iter_modules(t.__path__, t.__name__ + '.'): importlib.import_module(module.name)\n"
        "print(fxopt.__file__, t.__file__, fxopt.__version__, sep='\\n')\n"
    )
    package, catalogue, version = run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(site)).splitlines()
    assert Path(package) == site / "fxopt" / "__init__.py"
    assert Path(catalogue) == site / "fxopt" / "transformations" / "__init__.py"
    assert version == fxopt.__version__

"""The package's metadata and the launch files: what is imported is declared, and what is declared can be installed."""

import ast
import importlib.metadata
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [*sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "launch").glob("*.sh")), ".ci/run"]


@pytest.fixture
def metadata(monkeypatch):
    """The arguments of `setup` in setup.py."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return given


def name(requirement):
    """`orbax-checkpoint>=0.11` -> `orbax-checkpoint`."""
    return re.split(r"[\[<>=!~ ]", requirement)[0].lower().replace("_", "-")


def test_every_library_that_tuning_imports_is_declared(metadata):
    """In the requirements or, where it is imported only when it is asked for, in an extra."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "tuning").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    libraries = {module.split(".")[0] for module in modules} - {"tuning", *sys.stdlib_module_names}
    owners = importlib.metadata.packages_distributions()
    extras = [requirement for extra, some in metadata["extras_require"].items() if extra != "test" for requirement in some]
    declared = {name(requirement) for requirement in [*metadata["install_requires"], *extras]}
    assert [library for library in sorted(libraries) if not {name(owner) for owner in owners.get(library, [library])} & declared] == []


def test_requirements_are_lower_bounds_that_the_environment_meets(metadata):
    for requirement in metadata["install_requires"]:
        bounded = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement)
        assert bounded, requirement
        installed, bound = (tuple(map(int, re.findall(r"\d+", v)[:2])) for v in (importlib.metadata.version(bounded[1]), bounded[2]))
        assert installed >= bound, requirement


def test_the_accelerator_extras_are_extras_of_jax(metadata):
    offered = importlib.metadata.metadata("jax").get_all("Provides-Extra")
    for extra in ("cuda", "tpu"):
        [requirement] = metadata["extras_require"][extra]
        assert re.fullmatch(r"jax\[(\w+)\]", requirement)[1] in offered


def test_every_folder_of_the_library_is_packaged(metadata):
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in (ROOT / "tuning").rglob("*.py")}
    assert set(metadata["packages"]) == folders


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_script_is_valid_bash(script):
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)


def test_an_old_python_is_refused_with_the_remedy(tmp_path):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/environment.sh").write_text((ROOT / "launch/environment.sh").read_text())
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    command = ["bash", "-euc", 'source launch/environment.sh ""; echo went on']
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHON": str(old)}, capture_output=True, text=True)
    assert done.returncode != 0 and "went on" not in done.stdout
    assert "Python 3.11 or later is needed" in done.stderr and "PYTHON=" in done.stderr


def test_an_environment_that_is_newer_than_setup_py_is_left_alone(tmp_path):
    for folder in ("launch", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "launch/environment.sh").write_text((ROOT / "launch/environment.sh").read_text())
    (tmp_path / "setup.py").write_text("")
    pip = tmp_path / ".venv/bin/pip"
    pip.write_text('#!/bin/sh\necho "$@" >> pip.log\n')
    pip.chmod(0o755)
    (tmp_path / ".venv/bin/activate").write_text('PATH="$PWD/.venv/bin:$PATH"\n')
    run = lambda: subprocess.run(["bash", "-euc", 'source launch/environment.sh ""'], cwd=tmp_path, check=True)  # noqa: E731
    run(), run()
    assert len((tmp_path / "pip.log").read_text().splitlines()) == 1
    later = (tmp_path / "setup.py").stat().st_mtime + 10
    os.utime(tmp_path / "setup.py", (later, later))
    run()
    assert len((tmp_path / "pip.log").read_text().splitlines()) == 2

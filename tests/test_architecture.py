"""Imports run one way, and the pure cores stay pure."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "serve" / "ridgewalk"
HEAVY = {"torch", "transformers", "ray"}
PURE = ("engine", "routing", "placement", "planning")

ALLOWED = {
    "placement": {"placement", "machine"},
    "metrics": {"metrics", "placement", "engine", "replica", "api", "routing"},  # others for type checking only
    "engine": {"engine"},
    "routing": {"routing", "engine", "least_squares"},
    "planning": {"planning", "placement", "engine", "routing", "bench", "config", "model_source", "zoo"},
    "kernels": {"kernels", "machine"},
    "parallel": {"parallel", "placement", "kernels"},
    "model": {"model", "engine", "parallel", "kernels", "placement"},
}


def imports(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_run_one_way(package: str) -> None:
    for file in (PACKAGE / package).rglob("*.py"):
        for name in imports(file):
            if name.startswith("ridgewalk."):
                assert name.split(".")[1] in ALLOWED[package], f"{file.name} imports {name}"
            if package in PURE:
                assert name.split(".")[0] not in HEAVY, f"{file.name} imports {name}"


@pytest.mark.parametrize(
    "module",
    ["ridgewalk.cli", "ridgewalk.app", "ridgewalk.api.ingress", "ridgewalk.replica.engine_replica",
     "ridgewalk.replica.ray_ranks", "ridgewalk.replica.zmq_executor"],
)  # fmt: skip
def test_only_ranks_import_torch(module: str) -> None:
    code = f"import sys, {module}; assert not {{'torch', 'transformers'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_files_stay_small_enough_to_hold_in_the_head() -> None:
    long = [
        f"{file.relative_to(PACKAGE)}: {count}"
        for file in PACKAGE.rglob("*.py")
        if (count := len(file.read_text().splitlines())) > 420
    ]
    assert long == []

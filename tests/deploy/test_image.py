from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ridgewalk.config import LONGEST_STREAM_S
from tests.deploy.manifests import ROOT, copied_sources, dockerfile, env_file, pod_templates, ray_service

NOT_SHIPPED = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")


def test_what_the_image_copies_exists_and_reaches_the_builder():
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = copied_sources()
    assert sources
    assert [source for source in sources if not source.exists()] == []
    assert {source.name for source in sources} == let_through


def test_the_copied_sources_install_every_file_of_the_package(tmp_path: Path):
    context = tmp_path / "src"
    context.mkdir()
    for source in copied_sources():
        if source.is_dir():
            shutil.copytree(source, context / source.name, ignore=NOT_SHIPPED)
        else:
            shutil.copy(source, context)
    package = context / "serve" / "ridgewalk"
    expected = {str(path.relative_to(context / "serve")) for path in package.rglob("*") if path.is_file()}
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path]
    subprocess.run([*pip, context], check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        assert expected - set(wheel.namelist()) == set()


def test_the_image_does_not_run_as_root():
    assert [arguments for instruction, arguments in dockerfile() if instruction == "USER"] == ["1000"]


def test_the_image_starts_a_service():
    instructions = dict(dockerfile())
    assert instructions["CMD"] == '["ridgewalk", "serve", "demo-dense"]'
    assert "127.0.0.1:8000/health" in instructions["HEALTHCHECK"]


def image_environment() -> dict[str, str]:
    pairs = [word.split("=", 1) for key, arguments in dockerfile() if key == "ENV" for word in arguments.split()]
    return {name: value for name, value in pairs if name.startswith("RAY_")}


def test_image_and_pods_have_the_environment_of_the_env_file():
    assert image_environment() == env_file()
    for template in pod_templates(ray_service("base")):
        for container in template["spec"]["containers"]:
            assert {item["name"]: item["value"] for item in container["env"]} == env_file()


def test_haproxy_is_on_and_keeps_the_longest_stream():
    environment = env_file()
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert float(environment["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) >= LONGEST_STREAM_S


def test_serve_reads_each_variable_that_is_set_for_it():
    from ray.serve._private import constants

    text = Path(constants.__file__).read_text()
    assert [name for name in env_file() if name.startswith("RAY_SERVE_") and f'"{name}"' not in text] == []


@pytest.mark.parametrize("layer", ["base", "overlays/gpu"])
def test_the_version_of_ray_is_the_one_that_is_installed(layer: str):
    import ray

    assert ray_service(layer)["spec"]["rayClusterConfig"]["rayVersion"] == ray.__version__

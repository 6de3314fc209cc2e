"""Reading what `deploy/` and `k8s/` hold, the way that Ray, Docker and Kubernetes read it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ridgewalk.zoo import zoo_path

ROOT = Path(__file__).parents[2]
DEPLOY, K8S = ROOT / "deploy", ROOT / "k8s"
CRDS = ROOT.parent / "shared" / "k8s"
RAY_SERVICE_CRD = CRDS / "ray.io_rayservices.yaml"
LAYERS = ["base", "overlays/cpu-demo", "overlays/gpu"]

# The shape of the zoo's model. Building an application reads a model's config and tokenizer and nothing else.
MODEL_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 640,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "tie_word_embeddings": True,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
}


def read_yaml(path: Path) -> Any:
    return yaml.load(path.read_text(), Loader=yaml.CSafeLoader)


def render(layer: str) -> list[dict[str, Any]]:
    """The objects of a kustomize folder. The base has no patches: it is read without kubectl."""
    folder = K8S / layer
    if layer == "base":
        files = read_yaml(folder / "kustomization.yaml")["resources"]
        text = "\n---\n".join((folder / file).read_text() for file in files)
    elif shutil.which("kubectl"):
        text = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=True).stdout
    else:
        pytest.skip("kubectl is not installed; it renders the overlays (kubectl kustomize)")
    return [document for document in yaml.load_all(text, Loader=yaml.CSafeLoader) if document]


def ray_service(layer: str) -> dict[str, Any]:
    return next(document for document in render(layer) if document["kind"] == "RayService")


def pod_templates(service: dict[str, Any]) -> list[dict[str, Any]]:
    """Head first."""
    cluster = service["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]


def serve_config(service: dict[str, Any]) -> dict[str, Any]:
    return yaml.safe_load(service["spec"]["serveConfigV2"])


def application_args(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the one application."""
    (application,) = config["applications"]
    return application["args"]


def buildable(args: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same arguments, with a model and keys that this machine has."""
    folder.joinpath("config.json").write_text(json.dumps(MODEL_CONFIG))
    folder.joinpath("tokenizer.json").write_bytes((zoo_path("demo-dense") / "tokenizer.json").read_bytes())
    folder.joinpath("keys").write_text("secret\n")
    models = [model | {"model": str(folder), "name": model.get("name", "demo")} for model in args["models"]]
    keys = {"api_key_file": str(folder / "keys")} if "api_key_file" in args else {}
    return args | keys | {"models": models}


def strict(schema: Any) -> Any:
    """A CRD's schema that refuses fields it does not know; the API server would drop them without a word."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    keeps = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    return result if schema.get("type") != "object" or keeps else result | {"additionalProperties": False}


def ray_service_schema() -> dict[str, Any]:
    if not RAY_SERVICE_CRD.exists():
        pytest.skip(f"KubeRay's CRDs are not beside this repository ({RAY_SERVICE_CRD})")
    versions = read_yaml(RAY_SERVICE_CRD)["spec"]["versions"]
    schema = next(version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")
    schema = strict(schema)
    schema["properties"]["metadata"] = {"type": "object"}  # the API server's own
    return schema


def env_file() -> dict[str, str]:
    lines = DEPLOY.joinpath("serve.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def dockerfile() -> Iterator[tuple[str, str]]:
    """Instructions and their arguments."""
    text = re.sub(r"^#.*\n", "", DEPLOY.joinpath("Dockerfile").read_text(), flags=re.MULTILINE)
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if line.strip():
            instruction, arguments = line.split(maxsplit=1)
            yield instruction, arguments


def copied_sources() -> list[Path]:
    """What the image takes from the repository."""
    copies = [arguments.split() for instruction, arguments in dockerfile() if instruction == "COPY"]
    return [ROOT / source for words in copies if not words[0].startswith("--from") for source in words[:-1]]

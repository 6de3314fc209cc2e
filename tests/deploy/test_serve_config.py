from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ray.serve._private.build_app import build_app
from ray.serve.schema import ServeDeploySchema

from ridgewalk.app import build
from ridgewalk.config import ModelConfig, PlacementConfig, ServeConfig, load_config, parse_config
from tests.deploy.manifests import (
    DEPLOY,
    LAYERS,
    application_args,
    buildable,
    pod_templates,
    ray_service,
    read_yaml,
    serve_config,
)

DEPLOYED = ["deploy", *LAYERS]


def config_of(place: str) -> dict[str, Any]:
    return read_yaml(DEPLOY / "serve_config.yaml") if place == "deploy" else serve_config(ray_service(place))


@pytest.mark.parametrize("place", DEPLOYED)
def test_serve_understands_every_field(place: str):
    config = config_of(place)
    parsed = ServeDeploySchema.model_validate(config).model_dump(mode="json", exclude_unset=True)
    assert parsed == config  # fields that Serve does not know would be missing


@pytest.mark.parametrize("place", DEPLOYED)
def test_the_application_builds(place: str, tmp_path: Path):
    config = config_of(place)
    assert config["applications"][0]["import_path"] == f"{build.__module__}:{build.__name__}"
    args = application_args(config)
    assert {"host", "port", "app_name"}.isdisjoint(args)  # the file says them elsewhere
    parse_config(args)
    build(buildable(args, tmp_path))


def test_the_demo_overlay_is_the_serve_config():
    assert config_of("overlays/cpu-demo") == config_of("deploy")


@pytest.mark.parametrize("layer", LAYERS)
def test_workers_have_room_for_every_bundle(layer: str, tmp_path: Path):
    service = ray_service(layer)
    application = build_app(build(buildable(application_args(serve_config(service)), tmp_path)), name="app")
    bundles = [
        Counter(bundle)
        for deployment in application.deployments
        for _ in range(deployment.num_replicas)
        for bundle in deployment._replica_config.placement_group_bundles
        or [{"CPU": deployment.ray_actor_options["num_cpus"]}]
    ]
    assert Counter(deployment.name for deployment in application.deployments)["Ingress"] == 1
    free = worker_resources(service)
    for bundle in sorted(bundles, key=lambda bundle: (bundle["GPU"], bundle["CPU"]), reverse=True):
        node = next((node for node in free if bundle <= node), None)
        assert node is not None, f"no worker has {dict(bundle)} left"
        node -= bundle


def worker_resources(service: dict[str, Any]) -> list[Counter[str]]:
    """What each worker gives Ray: its container's limits."""
    nodes = []
    for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        assert limits == container["resources"]["requests"]
        resources = {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0))}
        nodes += [Counter(resources) for _ in range(group["replicas"])]
    return nodes


@pytest.mark.parametrize("layer", LAYERS)
def test_every_pod_mounts_the_files_that_the_arguments_name(layer: str):
    service = ray_service(layer)
    args = application_args(serve_config(service))
    names = [model["model"] for model in args["models"]] + [args.get("api_key_file", "")]
    folders = [Path(name).parent for name in names if name.startswith("/")]
    for template in pod_templates(service):
        (container,) = template["spec"]["containers"]
        mounts = {Path(mount["mountPath"]) for mount in container["volumeMounts"]}
        assert set(folders) <= mounts
        volumes = {volume["name"] for volume in template["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_ranks_say_their_threads_where_a_container_limits_them():
    for layer in LAYERS:
        for model in application_args(serve_config(ray_service(layer)))["models"]:
            assert [p["threads_per_rank"] for p in model["placements"]] == [
                p.get("cpus_per_rank", 1) for p in model["placements"]
            ]


def test_the_example_service_has_every_option_with_its_default():
    placement = PlacementConfig(memory=512 * 2**20)
    expected = ServeConfig(models=[ModelConfig(model="demo-dense", name="demo", placements=[placement])])
    assert load_config(DEPLOY / "service.yaml") == expected
    data = read_yaml(DEPLOY / "service.yaml")
    (model,) = data["models"]
    (shape,) = model["placements"]
    for given, config in ((data, ServeConfig), (model, ModelConfig), (shape, PlacementConfig)):
        assert given.keys() == config.model_fields.keys()

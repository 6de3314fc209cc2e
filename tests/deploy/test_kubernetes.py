from __future__ import annotations

import copy
from typing import Any

import jsonschema
import pytest

from tests.deploy.manifests import K8S, LAYERS, pod_templates, ray_service, ray_service_schema, read_yaml, render

KUBERNETES = "1.33"


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return ray_service_schema()


@pytest.mark.parametrize("layer", LAYERS)
def test_kuberay_knows_every_field(layer: str, schema: dict[str, Any]):
    jsonschema.Draft202012Validator(schema).validate(ray_service(layer))


def test_the_check_finds_a_field_that_kuberay_would_drop(schema: dict[str, Any]):
    service = copy.deepcopy(ray_service("base"))
    service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["enviroment"] = []
    with pytest.raises(jsonschema.ValidationError, match="enviroment"):
        jsonschema.Draft202012Validator(schema).validate(service)


@pytest.mark.parametrize("layer", LAYERS)
def test_kubernetes_knows_every_field_of_the_other_objects(layer: str):
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    for document in render(layer):
        if document["kind"] != "RayService":
            kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_each_disruption_budget_guards_pods_that_exist():
    templates = pod_templates(ray_service("base"))
    budgets = [document for document in render("base") if document["kind"] == "PodDisruptionBudget"]
    assert len(budgets) == len(templates)
    for budget in budgets:
        wanted = budget["spec"]["selector"]["matchLabels"].items()
        guarded = [template for template in templates if wanted <= template["metadata"]["labels"].items()]
        assert len(guarded) == 1
        assert isinstance(budget["spec"]["minAvailable"], int)  # all that Kubernetes allows for such pods


def test_the_demo_overlay_can_be_drained():
    assert [document["kind"] for document in render("overlays/cpu-demo")] == ["RayService"]


@pytest.mark.parametrize("layer", LAYERS)
def test_service_probe_and_application_agree_on_the_port(layer: str):
    service = ray_service(layer)
    (port,) = service["spec"]["serveService"]["spec"]["ports"]
    assert port == {"name": "serve", "port": 8000}
    for template in pod_templates(service):
        ports = {item["name"]: item["containerPort"] for item in template["spec"]["containers"][0]["ports"]}
        assert ports["serve"] == port["port"]
    probe = pod_templates(service)[1]["spec"]["containers"][0]["readinessProbe"]["httpGet"]
    assert probe == {"path": "/-/healthz", "port": "serve"}


def test_the_service_monitor_selects_the_service_and_sees_one_target():
    monitor = read_yaml(K8S / "components" / "service-monitor" / "servicemonitor.yaml")["spec"]
    service = ray_service("base")["spec"]["serveService"]
    (endpoint,) = monitor["endpoints"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]
    address, dropped = endpoint["relabelings"]
    assert address["targetLabel"] == "__address__"
    assert address["replacement"] == f"$1.svc:{service['spec']['ports'][0]['port']}"
    assert {"pod", "container", "endpoint"} <= set(dropped["regex"].split("|"))


@pytest.mark.parametrize("layer", LAYERS)
def test_pods_run_without_privileges(layer: str):
    for template in pod_templates(ray_service(layer)):
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in template["spec"]["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False


def test_no_manifest_names_a_namespace():
    assert [path for path in K8S.rglob("*.yaml") if "namespace:" in path.read_text()] == []

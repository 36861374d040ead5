"""The files in deploy/ against the schemas of the programs that read them, and against each other.

No package carries the schema of KubeRay's RayCluster. Its pods are checked as Kubernetes' own, its other
fields by name.
"""

from __future__ import annotations

import json
import re
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from mezzotint.config import EndpointSettings, Settings

DEPLOY = Path(__file__).parent.parent / "deploy"
COMPOSE = sorted(DEPLOY.rglob("compose.yaml"))
KUBERNETES = "1.37"
CLUSTER_FIELDS = {
    "rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs",
}  # fmt: skip
HEAD_FIELDS = {"rayStartParams", "template"}
GROUP_FIELDS = HEAD_FIELDS | {"groupName", "replicas", "minReplicas", "maxReplicas"}
"""Those that we use, of RayClusterSpec, HeadGroupSpec and WorkerGroupSpec of ray.io/v1."""


def objects() -> list[dict[str, Any]]:
    files = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    return [each for file in files for each in yaml.safe_load_all(file.read_text())]


def one(kind: str, name: str = "mezzotint") -> dict[str, Any]:
    return next(each for each in objects() if (each["kind"], each["metadata"]["name"]) == (kind, name))


def pods() -> list[dict[str, Any]]:
    """The templates of all pods."""
    cluster = one("RayCluster")["spec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [one("StatefulSet")["spec"]["template"], *(group["template"] for group in groups)]


def validate(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


def compose_schema() -> dict[str, Any]:
    name = "builtin_schemas/vendor/compose-spec.json"
    schema: dict[str, Any] = json.loads((resources.files("check_jsonschema") / name).read_text())
    return schema


@pytest.mark.parametrize("file", COMPOSE, ids=lambda file: str(file.relative_to(DEPLOY)))
def test_a_compose_file_follows_the_specification(file: Path) -> None:
    document = yaml.safe_load(file.read_text())
    jsonschema.validate(document, compose_schema())
    for name, service in document["services"].items():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            known = (
                (file.parent / source).is_file() if source.startswith(".") else source in document["volumes"]
            )
            assert known, f"{name}: {volume}"
        assert set(service.get("depends_on", [])) <= document["services"].keys()
        if "build" in service:
            assert (file.parent / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def test_the_schema_of_compose_files_can_refuse() -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"services": {"one": {"imagee": "x"}}}, compose_schema())


def test_what_the_image_copies_reaches_the_build() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    let_in = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    for name in " ".join(copied).split():
        assert f"!{name}" in let_in, name


def test_the_gateways_of_the_compose_file_share_all_but_their_folder() -> None:
    services = yaml.safe_load((DEPLOY / "scale/compose.yaml").read_text())["services"]
    first, second = services["gateway-1"], services["gateway-2"]
    assert first["environment"] == second["environment"]
    assert first["volumes"][0] != second["volumes"][0]
    assert all(
        f"{name}:8000" in (DEPLOY / "scale/Caddyfile").read_text() for name in ("gateway-1", "gateway-2")
    )


def test_the_kubernetes_objects_follow_the_schemas() -> None:
    kinds = [each["kind"] for each in objects()]
    assert {"RayCluster", "StatefulSet", "Service", "PodDisruptionBudget", "ConfigMap"} <= set(kinds)
    for each in objects():
        if each["kind"] != "RayCluster":
            validate(each)
    for template in pods():
        validate({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template})


def test_the_schemas_of_kubernetes_can_refuse() -> None:
    template = pods()[0]
    template["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        validate({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template})


def test_the_ray_cluster_has_fields_that_kuberay_knows() -> None:
    cluster = one("RayCluster")
    assert cluster["apiVersion"] == "ray.io/v1"
    spec = cluster["spec"]
    assert spec.keys() <= CLUSTER_FIELDS
    assert spec["headGroupSpec"].keys() <= HEAD_FIELDS
    for group in spec["workerGroupSpecs"]:
        assert group.keys() <= GROUP_FIELDS
        assert group["minReplicas"] == 0, "scales to zero"
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    pinned = re.search(r"^ray==(\S+)$", (DEPLOY.parent / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert spec["rayVersion"] == pinned[1]


def test_the_configuration_in_the_config_map_is_one() -> None:
    values = tomllib.loads(one("ConfigMap")["data"]["mezzotint.toml"])
    endpoints = tuple(EndpointSettings(**each) for each in values["endpoints"])
    settings = Settings(**values["server"], endpoints=endpoints)
    assert settings.ray == "auto"
    assert endpoints[0].min_replicas == 0
    assert endpoints[0].ray is not None
    worker = one("RayCluster")["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    requests = worker["resources"]["requests"]
    assert endpoints[0].ray.num_gpus <= float(requests["nvidia.com/gpu"]), "a worker fits on its machine"
    assert endpoints[0].ray.num_cpus <= float(requests["cpu"])


def test_secrets_are_named_and_never_written_down() -> None:
    assert "Secret" not in [each["kind"] for each in objects()]
    for template in pods():
        for container in template["spec"]["containers"]:
            for each in container["env"]:
                if re.search("KEY|TOKEN|PASSWORD|DATABASE_URL", each["name"]):
                    assert each.keys() == {"name", "valueFrom"}
                    assert each["valueFrom"].keys() == {"secretKeyRef"}


def test_the_budget_and_the_services_select_the_gateways() -> None:
    gateways = one("StatefulSet")["spec"]
    labels = gateways["template"]["metadata"]["labels"]
    assert gateways["selector"]["matchLabels"] == labels
    assert one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert all(
        one("Service", name)["spec"]["selector"] == labels for name in ("mezzotint", "mezzotint-gateways")
    )
    container = gateways["template"]["spec"]["containers"][0]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] == "/healthz"

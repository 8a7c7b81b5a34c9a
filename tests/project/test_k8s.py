"""Manifests are what Kubernetes and KubeRay accept, ask for no more than they need, and name flags that exist."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from jobs.doctor import doctor_parser
from jobs.evaluation.options import evaluation_parser
from jobs.one_for_all.options import one_for_all_parser
from jobs.protection.options import protection_parser
from jobs.shared.cli import Parser, read_config
from jobs.uploads.options import uploads_parser
from pipeline.metrics import METRICS
from tests.support.manifests import (
    K8S,
    OPTIONS,
    OVERLAYS,
    ROOT,
    commands,
    pods,
    ray_schemas,
    rendered,
    strings,
    written,
)

PARSERS: dict[str, Parser] = {
    "protect_imagenet": protection_parser(),
    "train_one_for_all": one_for_all_parser(),
    "evaluate_relearning": evaluation_parser(),
    "protect_uploads": uploads_parser(),
    "doctor": doctor_parser(),
}
CHOICES = [(overlay, ()) for overlay in OVERLAYS] + [(overlay, OPTIONS) for overlay in OVERLAYS]
OPERATOR = "monitoring.coreos.com/"  # its kinds have no schema here: what is in them is tested with Prometheus itself
BYTES = {"Gi": 1 << 30, "Mi": 1 << 20}


@pytest.fixture(params=CHOICES, ids=lambda choice: "+".join([choice[0], *choice[1]]))
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> list[dict[str, Any]]:
    """Everything that an overlay renders, without options and with all of them."""
    overlay, options = request.param
    return rendered(f"overlays/{overlay}", tmp_path, *options)


def identity(one: dict[str, Any]) -> str:
    return f"{one['kind']}/{one['metadata']['name']}"


def test_kubernetes_accepts_every_object_and_knows_every_field(objects: list[dict[str, Any]]) -> None:
    checked = 0
    for one in objects:
        if not one["apiVersion"].startswith("ray.io/"):
            kubernetes_validate.validate(one, "1.37", strict=True)
            checked += 1
    assert checked > 10


def test_kuberay_accepts_every_ray_object_and_knows_every_field(objects: list[dict[str, Any]]) -> None:
    schemas = ray_schemas()
    ours = [one for one in objects if one["apiVersion"].startswith("ray.io/")]
    assert len(ours) >= 3
    for one in ours:
        validator = jsonschema.Draft202012Validator(schemas[one["apiVersion"], one["kind"]])
        errors = [f"{identity(one)}: {list(e.path)}: {e.message[:200]}" for e in validator.iter_errors(one)]
        assert errors == []


@pytest.mark.parametrize(("file", "one"), written(), ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_written_is_accepted_before_kustomize_touches_it(file: str, one: dict[str, Any]) -> None:
    if one["apiVersion"].startswith("ray.io/"):
        jsonschema.validate(one, ray_schemas()[one["apiVersion"], one["kind"]], jsonschema.Draft202012Validator)
    elif not one["apiVersion"].startswith(OPERATOR):
        kubernetes_validate.validate(one, "1.37", strict=True)


def test_a_wrong_field_would_be_found() -> None:
    schemas = ray_schemas()
    (job,) = (one for file, one in written() if file == "base/protect-imagenet.yaml")
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePolicy"] = "Always"
    assert list(jsonschema.Draft202012Validator(schemas["ray.io/v1", "RayJob"]).iter_errors(job))


def test_every_reference_leads_to_an_object_that_is_rendered(objects: list[dict[str, Any]]) -> None:
    names = {(one["kind"], one["metadata"]["name"]) for one in objects}
    for one in objects:
        assert one["metadata"].get("namespace", "scumble") == "scumble"
        for pod in pods(one):
            for volume in pod["volumes"]:
                if "configMap" in volume:
                    assert ("ConfigMap", volume["configMap"]["name"]) in names, identity(one)
                    assert re.search("-[a-z0-9]{10}$", volume["configMap"]["name"])  # changed settings, another name
                if "persistentVolumeClaim" in volume:
                    assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in names
            if "serviceAccountName" in pod:
                assert ("ServiceAccount", pod["serviceAccountName"]) in names, identity(one)
            assert {container["image"] for container in pod["containers"]} == {"scumble:0.1"}


def test_names_inside_of_ray_s_objects_follow_a_prefix(tmp_path: Path) -> None:
    objects = rendered("overlays/cpu", tmp_path, *OPTIONS, more="namePrefix: mine-\n")
    for one in objects:
        for pod in pods(one) if one["kind"].startswith("Ray") else ():
            names = {volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume}
            names |= {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
            names |= {pod["serviceAccountName"]} if "serviceAccountName" in pod else set()
            assert [name for name in names if not name.startswith("mine-")] == []


@pytest.mark.parametrize(("file", "one"), written(), ids=lambda value: value if isinstance(value, str) else "")
def test_pods_are_restricted_and_ask_for_what_they_may_use(file: str, one: dict[str, Any]) -> None:
    for pod in pods(one):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        for volume in pod["volumes"]:
            assert len(volume.keys() & {"configMap", "emptyDir", "persistentVolumeClaim"}) == 1, volume
            assert "emptyDir" not in volume or "sizeLimit" in volume["emptyDir"], volume
        for container in pod["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["runAsNonRoot"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            resources = container["resources"]
            assert resources["requests"] == resources["limits"]
            assert {"cpu", "memory", "ephemeral-storage"} <= resources["limits"].keys()
            assert "env" not in container, "values do not belong into manifests"


def test_the_autoscaler_s_own_container_is_restricted_too(tmp_path: Path) -> None:
    objects = rendered("overlays/cpu", tmp_path, "autoscaling")
    (job,) = (one for one in objects if identity(one) == "RayJob/protect-imagenet")
    spec = job["spec"]["rayClusterSpec"]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert spec["autoscalerOptions"]["resources"]["requests"] == spec["autoscalerOptions"]["resources"]["limits"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_autoscaler_has_room_to_scale(overlay: str, tmp_path: Path) -> None:
    for one in rendered(f"overlays/{overlay}", tmp_path, *OPTIONS):
        if one["kind"] == "RayJob":
            (group,) = one["spec"]["rayClusterSpec"]["workerGroupSpecs"]
            least, most = group["minReplicas"], group["maxReplicas"]
            is_scaled = one["metadata"]["name"] == "protect-imagenet"
            assert (least, most) == ((1, 8) if is_scaled else (2, 2)), identity(one)


def test_one_name_for_the_image_reaches_every_pod(tmp_path: Path) -> None:
    named = (
        (K8S / "base/kustomization.yaml")
        .read_text()
        .replace("  - name: scumble\n", "  - name: scumble\n    newName: registry.example/art/scumble\n")
    )
    found = {
        container["image"]
        for one in rendered("overlays/cpu", tmp_path, *OPTIONS, changed={"base/kustomization.yaml": named})
        for pod in pods(one)
        for container in pod["containers"]
    }
    assert found == {"registry.example/art/scumble:0.1"}


def test_weights_are_mounted_wherever_settings_may_name_them(tmp_path: Path) -> None:
    for one in rendered("overlays/cpu", tmp_path, *OPTIONS):
        for pod in pods(one):
            if any("configMap" in volume for volume in pod["volumes"]):
                assert any(volume["name"] == "weights" for volume in pod["volumes"]), identity(one)
                mounts = [mount for container in pod["containers"] for mount in container["volumeMounts"]]
                assert {"name": "weights", "mountPath": "/weights", "readOnly": True} in mounts, identity(one)


def test_what_the_image_s_build_imports_exists() -> None:
    imports = re.findall(r"from ([\w.]+) import (\w+)", (K8S / "Dockerfile").read_text())
    assert imports
    for module, name in imports:
        assert hasattr(importlib.import_module(module), name), module


def ray_specs() -> list[tuple[str, dict[str, Any]]]:
    jobs = [(one["metadata"]["name"], one) for _, one in written() if one["kind"] in ("RayJob", "RayCronJob")]
    return [(name, one["spec"].get("jobTemplate", one["spec"])) for name, one in jobs]


@pytest.mark.parametrize(("name", "spec"), ray_specs(), ids=lambda value: value if isinstance(value, str) else "")
def test_ray_jobs_are_bounded_fixed_and_behind_a_token(name: str, spec: dict[str, Any]) -> None:
    cluster = spec["rayClusterSpec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["activeDeadlineSeconds"] > spec["preRunningDeadlineSeconds"] > 0
    assert cluster["authOptions"] == {"mode": "token"}
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (group,) = cluster["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    for node in (cluster["headGroupSpec"], group):
        (container,) = node["template"]["spec"]["containers"]
        (shm,) = (v["emptyDir"] for v in node["template"]["spec"]["volumes"] if v["name"] == "shm")
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        size, memory = (int(text[:-2]) * BYTES[text[-2:]] for text in (shm["sizeLimit"], _memory(container)))
        assert int(node["rayStartParams"]["object-store-memory"]) < size < memory / 2
        assert {"name": "metrics", "containerPort": 8080} in container["ports"]
        assert node["rayStartParams"]["metrics-export-port"] == "8080"


def _memory(container: dict[str, Any]) -> str:
    found: str = container["resources"]["limits"]["memory"]
    return found


def test_the_cron_job_keeps_its_runs_apart_and_has_an_end() -> None:
    (one,) = (one for _, one in written() if one["kind"] == "CronJob")
    spec, job = one["spec"], one["spec"]["jobTemplate"]["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert spec["startingDeadlineSeconds"] > 10  # below that the controller may never start it
    assert {"successfulJobsHistoryLimit", "failedJobsHistoryLimit"} <= spec.keys()
    assert {"activeDeadlineSeconds", "ttlSecondsAfterFinished", "backoffLimit"} <= job.keys()


def test_a_gpu_overlay_asks_for_gpus_in_the_pod_and_in_the_job(tmp_path: Path) -> None:
    objects = rendered("overlays/nvidia", tmp_path)
    jobs = [one for one in objects if one["kind"] == "RayJob"]
    assert len(jobs) == 3
    for job in jobs:
        (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        (container,) = group["template"]["spec"]["containers"]
        assert (
            container["resources"]["limits"]["nvidia.com/gpu"] == container["resources"]["requests"]["nvidia.com/gpu"]
        )
        assert job["spec"]["entrypoint"].endswith("--gpus-per-worker 1")
        head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
        assert "nvidia.com/gpu" not in head["resources"]["limits"]


def test_every_command_names_a_job_and_flags_that_it_has(tmp_path: Path) -> None:
    found = [words for _, one in written() for words in commands(one)]
    for path in K8S.rglob("kustomization.yaml"):
        found += [line.split()[1:] for line in path.read_text().splitlines() if " python jobs/" in line]
    called = set()
    for words in found:
        (job,) = (re.fullmatch(r"jobs/(\w+)\.py", word)[1] for word in words if word.startswith("jobs/"))  # type: ignore[index]
        called.add(job)
        flags = {flag for action in PARSERS[job]._actions for flag in action.option_strings}
        assert {word for word in words if word.startswith("--")} <= flags, words
        settings = words[words.index("--config") + 1]
        assert (K8S / "base" / settings.strip("/")).is_file()
    assert called == PARSERS.keys()


@pytest.mark.parametrize("file", sorted((K8S / "base" / "settings").iterdir()), ids=lambda file: file.name)
def test_settings_are_options_of_their_job(file: Path) -> None:
    assert read_config(file, PARSERS[file.stem.replace("-", "_")])


def test_network_policies_deny_all_that_is_not_named() -> None:
    policies = {one["metadata"]["name"]: one["spec"] for _, one in written() if one["kind"] == "NetworkPolicy"}
    assert policies["deny-all"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, spec in policies.items():
        for rule in spec.get("ingress", []):
            assert rule.get("from"), name
    found = [to["ipBlock"] for rule in policies["names-and-bucket"]["egress"] for to in rule["to"] if "ipBlock" in to]
    blocks = {block["cidr"]: block.get("except", []) for block in found}
    assert blocks.keys() == {"169.254.20.10/32", "0.0.0.0/0", "::/0"}
    assert "169.254.0.0/16" in blocks["0.0.0.0/0"]  # the metadata of the machine
    assert "fd00:ec2::/32" in blocks["::/0"]


def test_nothing_names_a_registry_a_machine_or_a_secret() -> None:
    for path in sorted(K8S.rglob("*")):
        if path.is_file():
            text = path.read_text()
            assert not re.search(r"\b(docker|ghcr|quay|nvcr|gcr)\.io|shared/|/work\b|localhost|AKIA[0-9A-Z]", text), (
                path
            )
    for _, one in written():
        assert one["kind"] != "Secret"
        assert not [text for text in strings(one) if "SECRET" in text.upper() and "=" in text]


def test_every_metric_is_in_the_table_of_the_documentation() -> None:
    page = (K8S / "README.md").read_text()
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `scumble_")}
    assert rows.keys() == {metric.exported for metric in METRICS}
    for metric in METRICS:
        row = rows[metric.exported]
        assert metric.kind in row, row
        assert [label for label in metric.labels if f"`{label}`" not in row] == []


def test_every_file_the_page_names_is_there() -> None:
    page = (K8S / "README.md").read_text()
    for name in set(re.findall(r"`((?:base|overlays|options|monitoring|k8s)/[\w./-]*|Dockerfile)`", page)):
        assert (K8S / name.removeprefix("k8s/")).exists(), name


def test_the_dashboard_and_the_alerts_name_metrics_and_labels_that_exist() -> None:
    names = {metric.exported for metric in METRICS}
    names |= {f"{m.name}_{part}" for m in METRICS if m.kind == "histogram" for part in ("bucket", "sum", "count")}
    labels = {label for metric in METRICS for label in metric.labels} | {"namespace", "component", "le"}
    for file in ("dashboard.json", "alerts.yaml", "alerts_test.yaml"):
        text = (K8S / "monitoring" / file).read_text()
        assert set(re.findall(r"scumble_\w+", text)) <= names, file
        for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", text):
            assert {label.strip() for label in group.split(",")} <= labels, group
    shown = (K8S / "monitoring" / "dashboard.json").read_text()
    assert {m.name for m in METRICS if m.name not in shown} == set(), "a metric that nobody sees"


def test_the_dashboard_is_one_that_grafana_can_load() -> None:
    dashboard = json.loads((K8S / "monitoring" / "dashboard.json").read_text())
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for panel in dashboard["panels"]:
        assert panel["title"]
        assert panel["description"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert panel["datasource"]["uid"] == "${datasource}"

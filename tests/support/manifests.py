"""What tests of k8s/ share: manifests as written and as kustomize renders them, schemas, everything that is in them."""

from __future__ import annotations

import functools
import gzip
import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
CRDS = ROOT.parent / "shared" / "data_crds"
OVERLAYS = ("cpu", "nvidia")
OPTIONS = ("autoscaling", "ray-cron-job", "weights-volume")
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # KubeRay's definitions are 3 MB


def written() -> list[tuple[str, dict[str, Any]]]:
    """(file, object) of every manifest in k8s/, as it is written."""
    found = []
    for path in sorted(K8S.rglob("*.yaml")):
        for one in yaml.load_all(path.read_text(), Loader):
            if isinstance(one, dict) and "kind" in one and one["kind"] not in ("Kustomization", "Component"):
                found.append((str(path.relative_to(K8S)), one))
    return found


def rendered(
    overlay: str, tmp_path: Path, *options: str, more: str = "", changed: Mapping[str, str] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """What `kubectl apply -k` would send, with some of the options and `more` lines; skipped without kubectl.

    changed  contents of files that a user has changed, by path below k8s/
    """
    _needs_kustomize()
    copy = tmp_path / "k8s"
    shutil.copytree(K8S, copy, dirs_exist_ok=True)
    for path, text in changed.items():
        (copy / path).write_text(text)
    folder = copy / overlay
    with (folder / "kustomization.yaml").open("a") as file:
        file.write(f"components: [{', '.join(f'../../options/{option}' for option in options)}]\n{more}")
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return [one for one in yaml.load_all(done.stdout, Loader) if one]


def _needs_kustomize() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed: manifests are checked as written, not as kustomize renders them")
    told = subprocess.run(["kubectl", "version", "--client", "-o", "json"], capture_output=True, text=True, check=False)
    version = str(json.loads(told.stdout or "{}").get("kustomizeVersion", "v0"))
    if int(version.lstrip("v").split(".")[0]) < 5:
        pytest.skip(f"this kubectl has kustomize {version}; rendering needs v5 (kubectl 1.27 or newer)")


@functools.cache
def ray_schemas() -> dict[tuple[str, str], Any]:
    """(apiVersion, kind) -> JSON schema that refuses unknown fields, from KubeRay's own definitions."""
    if not CRDS.is_dir():
        pytest.skip("KubeRay's resource definitions are not beside this checkout")
    found = {}
    for path in sorted(CRDS.glob("*.yaml.gz")):
        for crd in yaml.load_all(gzip.decompress(path.read_bytes()), Loader):
            for version in crd["spec"]["versions"]:
                schema = _strict(version["schema"]["openAPIV3Schema"])
                schema["properties"]["metadata"] = {"type": "object"}
                found[f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"]] = schema
    return found


def _strict(schema: Any) -> Any:
    """A structural schema of Kubernetes as a JSON schema; fields that it does not name are refused."""
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    left_out = ("nullable", "format", "description")
    out = {name: value for name, value in schema.items() if not name.startswith("x-") and name not in left_out}
    if schema.get("nullable") and "type" in schema:
        out["type"] = [schema["type"], "null"]
    if "properties" in schema:
        fields = schema["properties"]
        out["required"] = [name for name in schema.get("required", []) if "default" not in fields.get(name, {})]
        out["properties"] = {name: _strict(value) for name, value in fields.items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema:
            out["additionalProperties"] = False
    for name in ("items", "additionalProperties", "not"):
        if isinstance(schema.get(name), dict):
            out[name] = _strict(schema[name])
    return out


def pods(node: Any) -> Iterator[dict[str, Any]]:
    """Every pod spec inside of an object: whatever has containers."""
    if isinstance(node, dict):
        if "containers" in node:
            yield node
        for value in node.values():
            yield from pods(value)
    elif isinstance(node, list):
        for value in node:
            yield from pods(value)


def strings(node: Any) -> Iterator[str]:
    """Every string value inside of an object."""
    if isinstance(node, dict):
        for value in node.values():
            yield from strings(value)
    elif isinstance(node, list):
        for value in node:
            yield from strings(value)
    elif isinstance(node, str):
        yield node


def commands(node: Any) -> Iterator[list[str]]:
    """Words of every entrypoint and of every container's command and arguments."""
    if isinstance(node, dict):
        if isinstance(node.get("entrypoint"), str):
            yield node["entrypoint"].split()
        if "image" in node and ("args" in node or "command" in node):
            yield [*node.get("command", []), *node.get("args", [])]
        for value in node.values():
            yield from commands(value)
    elif isinstance(node, list):
        for value in node:
            yield from commands(value)


def rules() -> dict[str, Any]:
    """The groups of alert rules, as plain Prometheus reads them."""
    groups: dict[str, Any] = yaml.safe_load((K8S / "monitoring" / "alerts.yaml").read_text())["spec"]
    return groups

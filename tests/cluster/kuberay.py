"""What a Kubernetes with KubeRay 1.7 would answer to a RayJob: the server by the CRD, then KubeRay's operator."""

import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import celpy
import jsonschema
import yaml

from tests.conftest import REPOSITORY

CRD = REPOSITORY / "tests/cluster/crds/ray.io_rayjobs.yaml"
INT_RANGES = {"int32": (-(2**31), 2**31 - 1), "int64": (-(2**63), 2**63 - 1)}
NAME_LENGTH = 47
"""Of a RayJob: KubeRay makes longer names of it."""


@cache
def structure() -> dict[str, Any]:
    """The structural schema of a RayJob of ray.io/v1."""
    crd = yaml.load(CRD.read_text(), Loader=yaml.CSafeLoader)
    [version] = [version for version in crd["spec"]["versions"] if version["name"] == "v1"]
    return version["schema"]["openAPIV3Schema"]


def strict(schema: Mapping[str, Any], top: bool = False) -> dict[str, Any]:
    """As JSON schema, with every field refused that the server would drop.

    Args:
        schema: a node of the structural schema.
        top: whether it is the resource itself, whose metadata the server knows without the CRD.
    """
    made = {name: value for name, value in schema.items() if not name.startswith("x-") and name != "nullable"}
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
        made["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if made.get("format") in INT_RANGES:
        low, high = INT_RANGES[made["format"]]
        made = {**made, "minimum": max(low, made.get("minimum", low)), "maximum": min(high, made.get("maximum", high))}
    if "properties" in made:
        made["properties"] = {name: strict(value) for name, value in made["properties"].items()}
    if "items" in made:
        made["items"] = strict(made["items"])
    if isinstance(made.get("additionalProperties"), dict):
        made["additionalProperties"] = strict(made["additionalProperties"])
    elif made.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made["additionalProperties"] = False
    if top:
        made["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    return {"anyOf": [made, {"type": "null"}]} if schema.get("nullable") else made


@cache
def validator() -> jsonschema.Draft7Validator:
    return jsonschema.Draft7Validator(strict(structure(), top=True))


def faults(manifest: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> list[str]:
    """Why the server would refuse it; empty if it would not.

    Args:
        manifest: a RayJob.
        before: the RayJob that it replaces; None is the first of its name.
    """
    if (manifest["apiVersion"], manifest["kind"]) != ("ray.io/v1", "RayJob"):
        return [f"{manifest['apiVersion']} {manifest['kind']} is no RayJob of ray.io/v1"]
    found = [f"{error.json_path}: {error.message}" for error in validator().iter_errors(dict(manifest))]
    for rule, value, past, path in rules(structure(), manifest, before, "$"):
        if not holds(rule["rule"], value, past):
            found.append(f"{path}: {rule['message']}")
    return found


def rules(
    schema: Mapping[str, Any], value: Any, past: Any, path: str
) -> Iterator[tuple[dict[str, str], Any, Any, str]]:
    """The CRD's CEL rules for what is there: rule, value, what it replaces, path."""
    for rule in schema.get("x-kubernetes-validations", []):
        yield rule, value, past, path
    if isinstance(value, Mapping):
        among = schema.get("properties", {})
        for name, item in value.items():
            inner = among.get(name, schema.get("additionalProperties"))
            if isinstance(inner, Mapping):
                yield from rules(inner, item, past.get(name) if isinstance(past, Mapping) else None, f"{path}.{name}")
    elif isinstance(value, list):
        for place, item in enumerate(value):  # items of a list without a key have no past
            yield from rules(schema.get("items", {}), item, None, f"{path}[{place}]")


def all_rules(schema: Mapping[str, Any] | None = None) -> Iterator[str]:
    """Every CEL rule that the CRD has."""
    schema = structure() if schema is None else schema
    yield from (rule["rule"] for rule in schema.get("x-kubernetes-validations", []))
    inner = [*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")]
    for node in inner:
        if isinstance(node, Mapping):
            yield from all_rules(node)


def holds(rule: str, value: Any, past: Any) -> bool:
    """Whether a rule holds; one about a change holds where nothing changes.

    Args:
        value: what the rule calls self.
        past: what it calls oldSelf.
    """
    given = {"self": celpy.json_to_cel(value)}
    if re.search(r"\boldSelf\b", rule):
        if past is None:
            return True
        given["oldSelf"] = celpy.json_to_cel(past)
    environment = celpy.Environment()
    return bool(environment.program(environment.compile(rule)).evaluate(given))


def refusals(manifest: Mapping[str, Any]) -> list[str]:
    """Why KubeRay's operator would refuse a RayJob that the server took, after validation.go of KubeRay 1.7."""
    name, spec = manifest["metadata"]["name"], manifest["spec"]
    cluster = spec.get("rayClusterSpec", {})
    mode, shutdown = spec.get("submissionMode", "K8sJobMode"), spec.get("shutdownAfterJobFinishes", False)
    deletion, picked = spec.get("deletionStrategy"), spec.get("clusterSelector")
    version = [int(part) for part in cluster.get("rayVersion", "0").split(".")[:2]]
    head_env = {one["name"] for one in cluster["headGroupSpec"]["template"]["spec"]["containers"][0].get("env", [])}
    wrong = {
        f"the name has more than {NAME_LENGTH} characters": len(name) > NAME_LENGTH,
        "the name is no DNS-1035 label": not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name),
        "suspend without shutdownAfterJobFinishes": spec.get("suspend") and not shutdown,
        "suspend with clusterSelector": spec.get("suspend") and picked,
        "a TTL without shutdownAfterJobFinishes": spec.get("ttlSecondsAfterFinished", 0) > 0 and not shutdown,
        "a TTL below 0": spec.get("ttlSecondsAfterFinished", 0) < 0,
        "deletionRules with shutdownAfterJobFinishes": (deletion or {}).get("deletionRules") and shutdown,
        "a deletionStrategy that says nothing": deletion is not None and not deletion,
        "SidecarMode with clusterSelector": mode == "SidecarMode" and picked,
        "SidecarMode with submitterPodTemplate": mode == "SidecarMode" and "submitterPodTemplate" in spec,
        "SidecarMode with submitterConfig": mode == "SidecarMode" and "submitterConfig" in spec,
        "InteractiveMode with backoffLimit": mode == "InteractiveMode" and spec.get("backoffLimit", 0) > 0,
        "a backoffLimit below 0": spec.get("backoffLimit", 0) < 0,
        "an activeDeadlineSeconds of 0": spec.get("activeDeadlineSeconds", 1) <= 0,
        "tokens without Ray 2.52": cluster.get("authOptions", {}).get("mode") == "token" and version < [2, 52],
        "redis without gcsFaultToleranceOptions": "RAY_REDIS_ADDRESS" in head_env,
        "a user of redis in the environment": "REDIS_USERNAME" in head_env,
        "an autoscaler in the environment": "RAY_enable_autoscaler_v2" in head_env,
    }
    return [sentence for sentence, is_so in wrong.items() if is_so]

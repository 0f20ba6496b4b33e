"""Kubernetes' Pod Security profile "restricted", as its admission reads a pod: every rule of baseline and its own."""

from collections.abc import Iterator, Mapping
from typing import Any

VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
SELINUX_TYPES = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
SECCOMP = {"RuntimeDefault", "Localhost"}


def containers(spec: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """All containers of a pod, whatever their kind."""
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        yield from spec.get(kind, [])


def violations(spec: Mapping[str, Any]) -> list[str]:
    """What "restricted" refuses in a pod's spec; empty if it lets it in."""
    pod = spec.get("securityContext", {})
    wrong = {
        **{f"{name} is shared": spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")},
        "sets sysctls": pod.get("sysctls"),
        "runs as user 0": pod.get("runAsUser") == 0,
        "is a HostProcess pod": pod.get("windowsOptions", {}).get("hostProcess"),
        "AppArmor is off": pod.get("appArmorProfile", {}).get("type") == "Unconfined",
        "SELinux options": _selinux(pod),
    }
    found = [sentence for sentence, is_so in wrong.items() if is_so]
    for volume in spec.get("volumes", []):
        [kind] = set(volume) - {"name"}
        if kind not in VOLUMES:
            found.append(f"volume {volume['name']} is of kind {kind}")
    for container in containers(spec):
        found += [f"{container['name']}: {sentence}" for sentence in _of_container(container, pod)]
    return found


def _of_container(container: Mapping[str, Any], pod: Mapping[str, Any]) -> Iterator[str]:
    """What is refused in one container; what it leaves out it has from its pod."""
    own = container.get("securityContext", {})
    capabilities = own.get("capabilities", {})
    hooks = [container.get("lifecycle", {}).get(name, {}) for name in ("postStart", "preStop")]
    probes = [container.get(name, {}) for name in ("livenessProbe", "readinessProbe", "startupProbe")]
    asks = [probe.get(kind, {}) for probe in hooks + probes for kind in ("httpGet", "tcpSocket")]
    wrong = {
        "is privileged": own.get("privileged"),
        "may gain privileges": own.get("allowPrivilegeEscalation") is not False,
        "may be root": own.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True,
        "runs as user 0": own.get("runAsUser") == 0,
        "does not drop ALL capabilities": "ALL" not in capabilities.get("drop", []),
        f"adds {capabilities.get('add')}": set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"},
        "has no seccomp profile": own.get("seccompProfile", pod.get("seccompProfile", {})).get("type") not in SECCOMP,
        "unmasks /proc": own.get("procMount", "Default") != "Default",
        "takes a port of the host": any(port.get("hostPort") for port in container.get("ports", [])),
        "AppArmor is off": own.get("appArmorProfile", {}).get("type") == "Unconfined",
        "SELinux options": _selinux(own),
        "is a HostProcess container": own.get("windowsOptions", {}).get("hostProcess"),
        "a probe or hook names a host": any(ask.get("host") for ask in asks),
    }
    yield from (sentence for sentence, is_so in wrong.items() if is_so)


def _selinux(context: Mapping[str, Any]) -> bool:
    """Whether a security context has SELinux options that are refused."""
    options = context.get("seLinuxOptions", {})
    return options.get("type", "") not in SELINUX_TYPES or bool(options.get("user") or options.get("role"))


def with_kuberays_own(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A worker's pod with the container that KubeRay puts before it, which waits for the head and takes image,
    environment, mounts and security context from the first container."""
    first = spec["containers"][0]
    waits = {name: first[name] for name in ("image", "env", "volumeMounts", "securityContext") if name in first}
    return {**spec, "initContainers": [*spec.get("initContainers", []), {"name": "wait-gcs-ready", **waits}]}

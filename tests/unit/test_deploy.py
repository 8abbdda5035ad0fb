"""deploy/: manifests, units, image and examples agree with the code, with each other and with docs/deploy.md.

There is no cluster here and no container engine: this is what can be known without them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml

import rtunnel
from rtunnel import config, errors, roles
from rtunnel.config import KEYS, Config, parse_endpoint, parse_range, preflight
from rtunnel.trust import pki
from rtunnel.workers import SILENCE
from rtunnel_authority.server import MAX_CONNECTIONS
from support.commands import command_of, shell_lines

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
FOLDERS = ("centre", "agent", "redis-example")
#: The authority is the fourth: it has no secrets to be given, and nothing to drain.
ROLES = ("broker", "agent", "gateway")
ALL = (*ROLES, "authority")
#: The oldest that docs/deploy.md names, and the newest that the package knows.
VERSIONS = ("1.30", kubernetes_validate.latest_version())
#: What a role writes, by the variables of its unit.
STATE = {
    "broker": {"RTUNNEL_BROKER_TRUST": "%S/rtunnel-broker/trust.list"},
    "agent": {"RTUNNEL_AGENT_IDENTITY": "%S/rtunnel-agent"},
    "gateway": {"RTUNNEL_GATEWAY_TRUST": "%S/rtunnel-gateway/trust.list"},
    "authority": {"RTUNNEL_AUTHORITY_DIRECTORY": "%S/rtunnel-authority/pki"},
}
#: Between the end of a drain and the kill: a broker still has its tuples to take back.
MARGIN = {"broker": 30.0, "agent": 15.0, "gateway": 15.0}
#: What `kubectl create secret` and the downward API would give.
SECRETS = {("rtunnel-registry", "url"): "redis://:secret@rtunnel-redis:6379/0"}
FIELDS = {
    "metadata.name": "rtunnel-broker-7c9d8b6f5-x2x4z",
    "spec.nodeName": "host-1.example",
    "status.podIP": "10.244.1.7",
    "status.hostIP": "10.1.0.7",
}

Manifest = dict[str, Any]


# --- a small kustomize ------------------------------------------------------------------------------------


@cache
def _rendered(folder: str) -> tuple[Manifest, ...]:
    """The manifests of a kustomization, as kustomize makes them but for the hash at the end of a ConfigMap's name.

    It knows only what ours use, and refuses the rest, so that it can't be wrong in silence.
    """
    base = KUBERNETES / folder
    plan = yaml.safe_load((base / "kustomization.yaml").read_text())
    assert set(plan) <= {"apiVersion", "kind", "namespace", "resources", "configMapGenerator"}
    manifests = [each for name in plan["resources"] for each in yaml.safe_load_all((base / name).read_text())]
    for generator in plan.get("configMapGenerator", []):
        assert set(generator) == {"name", "files"}
        data = {name: (base / name).read_text() for name in generator["files"]}
        metadata = {"name": generator["name"]}
        manifests.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    for manifest in manifests:
        if manifest["kind"] != "Namespace":
            manifest["metadata"]["namespace"] = plan["namespace"]
    return tuple(manifests)


def render(folder: str) -> list[Manifest]:
    return deepcopy(list(_rendered(folder)))


def of_kind(folder: str, *kinds: str) -> list[Manifest]:
    return [manifest for manifest in render(folder) if manifest["kind"] in kinds]


def title(manifest: Manifest) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


@dataclass(frozen=True)
class Workload:
    """A Deployment or DaemonSet with its one container."""

    folder: str
    manifest: Manifest

    @property
    def name(self) -> str:
        return str(self.manifest["metadata"]["name"])

    @property
    def pod(self) -> Manifest:
        return dict(self.manifest["spec"]["template"]["spec"])

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.manifest["spec"]["template"]["metadata"]["labels"])

    @property
    def container(self) -> Manifest:
        (container,) = self.pod["containers"]
        return dict(container)

    @property
    def probes(self) -> list[Manifest]:
        return [probe for key, probe in self.container.items() if key.endswith("Probe")]

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container.get("ports", [])}

    @property
    def environ(self) -> dict[str, str]:
        """The container's variables, with the sample values above."""
        found = {}
        for entry in self.container.get("env", []):
            source = entry["valueFrom"]
            if field := source.get("fieldRef"):
                found[entry["name"]] = FIELDS[field["fieldPath"]]
            else:
                reference = source["secretKeyRef"]
                found[entry["name"]] = SECRETS[reference["name"], reference["key"]]
        return found

    def mounted(self) -> dict[str, tuple[Manifest, str]]:
        """Every file that a volume puts into the container: its volume, and its key there."""
        volumes = {volume["name"]: volume for volume in self.pod["volumes"]}
        files: dict[str, tuple[Manifest, str]] = {}
        for mount in self.container["volumeMounts"]:
            volume = volumes[mount["name"]]
            if "secret" in volume:
                keys = {item["path"]: item["key"] for item in volume["secret"]["items"]}
            elif "configMap" in volume:
                keys = {key: key for key in config_map(self.folder, volume["configMap"]["name"])}
            else:
                keys = {}
            files |= {f"{mount['mountPath']}/{path}": (volume, key) for path, key in keys.items()}
        return files


def config_map(folder: str, name: str) -> dict[str, str]:
    (found,) = [each for each in of_kind(folder, "ConfigMap") if each["metadata"]["name"] == name]
    return dict(found["data"])


def workloads(folder: str) -> list[Workload]:
    return [Workload(folder, manifest) for manifest in of_kind(folder, "Deployment", "DaemonSet")]


def workload(role: str) -> Workload:
    (found,) = [each for folder in FOLDERS for each in workloads(folder) if each.name == f"rtunnel-{role}"]
    return found


def toml_in_pod(role: str) -> str:
    """The text of the configuration file that the container's arguments name."""
    pod = workload(role)
    volume, key = pod.mounted()[pod.container["args"][-1]]
    return config_map(pod.folder, volume["configMap"]["name"])[key]


def load(text: str, folder: Path, environ: dict[str, str]) -> Config:
    file = folder / "rtunnel.toml"
    file.write_text(text)
    return config.load(file, environ, {})


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """What `rtunnel pki init` makes."""
    pki.init(tmp_path / "pki")
    return tmp_path / "pki"


# --- Kubernetes: what kustomize and the API server would say ----------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_manifests_match_the_schemas(folder: str, version: str) -> None:
    """Every manifest is valid for the oldest and the newest Kubernetes, with no unknown field."""
    for manifest in render(folder):
        try:
            kubernetes_validate.validate(manifest, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            pytest.fail(f"{title(manifest)}: {'.'.join(map(str, error.path))}: {error.message}")


def test_the_schemas_are_strict() -> None:
    """A misspelt field in the depth of a manifest is found: the test above can fail."""
    manifest = workload("broker").manifest
    manifest["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, VERSIONS[0], strict=True)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("folder", FOLDERS)
def test_kustomize_renders_the_same(folder: str) -> None:
    """The small kustomize of this file and the real one agree, but for the ConfigMaps' hashes and the order."""
    command = ["kubectl", "kustomize", str(KUBERNETES / folder)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for manifest in of_kind(folder, "ConfigMap"):
        text, hashed = re.subn(rf"(name: {manifest['metadata']['name']})-[a-z0-9]{{10}}$", r"\1", text, flags=re.M)
        assert hashed == 2, "the ConfigMap, and the one volume that refers to it"
    assert sorted(yaml.safe_load_all(text), key=title) == sorted(render(folder), key=title)


@pytest.mark.parametrize("folder", FOLDERS)
def test_selectors_find_their_pods(folder: str) -> None:
    """Every selector in a namespace matches exactly the workload of the same name."""
    found = workloads(folder)
    checked = 0
    for manifest in render(folder):
        for selector in _selectors(manifest):
            matching = [each.name for each in found if selector.items() <= each.labels.items()]
            assert matching == [manifest["metadata"]["name"]], title(manifest)
            checked += 1
    assert checked >= len(found)


def _selectors(manifest: Manifest) -> Iterator[dict[str, str]]:
    spec = manifest.get("spec", {})
    if manifest["kind"] == "Service":
        yield spec["selector"]
    elif manifest["kind"] == "NetworkPolicy":
        if spec["podSelector"]:
            yield spec["podSelector"]["matchLabels"]
    elif "selector" in spec:
        yield spec["selector"]["matchLabels"]
    if "template" in spec:
        for constraint in spec["template"]["spec"].get("topologySpreadConstraints", []):
            yield constraint["labelSelector"]["matchLabels"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_pods_are_hardened(folder: str) -> None:
    """No root, no capability, no escalation, read-only root, no token; only agents see the host's network."""
    for each in workloads(folder):
        pod, inside = each.pod, each.container["securityContext"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 65532
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert inside["capabilities"] == {"drop": ["ALL"]}
        assert inside["allowPrivilegeEscalation"] is False
        assert inside["readOnlyRootFilesystem"] is True
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False
        assert pod.get("hostNetwork", False) is (each.name == "rtunnel-agent")
        assert not {"hostPID", "hostIPC"} & set(pod)
        paths = [volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume]
        assert paths == (["/var/lib/rtunnel"] if each.name == "rtunnel-agent" else [])
        for made in pod.get("initContainers", []):
            assert made["image"] == each.container["image"]
            if each.name == "rtunnel-agent":  # root for as long as it takes to give a folder away
                assert made["command"][-1] == "/var/lib/rtunnel/agent" and made["command"][0] == "install"
                assert made["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN", "FOWNER"]}
                assert made["securityContext"]["allowPrivilegeEscalation"] is False
                assert made["securityContext"]["readOnlyRootFilesystem"] is True
            else:
                assert made["securityContext"] == inside
        for volume in pod["volumes"]:
            assert volume.get("secret", {"defaultMode": 0o440})["defaultMode"] == 0o440
        assert {"requests", "limits"} <= set(each.container["resources"])


# --- Kubernetes: manifests and configuration --------------------------------------------------------------


@pytest.mark.parametrize("role", ALL)
def test_a_pod_could_start(role: str, tmp_path: Path, secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ConfigMap's file, the manifest's variables and the Secrets of `pki init` are all that a role needs."""
    pod = workload(role)
    assert pod.container["args"][:2] == [role, "--config"]
    assert set(pod.environ) <= {leaf.env for leaf in KEYS.values()}
    for name, content in config_map(pod.folder, f"rtunnel-{role}").items():
        (tmp_path / name).write_text(content)
    text = toml_in_pod(role).replace("/etc/rtunnel/pki", str(secrets)).replace("/var/lib/rtunnel", str(tmp_path))
    monkeypatch.setattr(preflight, "descriptor_limit", lambda: 1048576)  # of the container runtime, see docs/deploy.md
    assert roles.check(load(text, tmp_path, pod.environ), role) == []


@pytest.mark.parametrize("role", ALL)
def test_secrets_are_mounted_where_the_file_says(role: str, tmp_path: Path) -> None:
    """The files that the configuration names are the Secret's files: no one less, and no one more."""
    pod = workload(role)
    loaded = load(toml_in_pod(role), tmp_path, pod.environ)
    named = {value for path, value in _files(loaded, role)}
    mounted = {
        path: volume["secret"]["secretName"] for path, (volume, _) in pod.mounted().items() if "secret" in volume
    }
    assert set(mounted) == named
    assert set(mounted.values()) == ({f"rtunnel-{role}"} if role in ROLES else set())


def _files(loaded: Config, role: str) -> Iterator[tuple[str, str]]:
    """The file keys of a role that are given: (key, path). Not the rules: they are no secret, and change in place."""
    for path, leaf in KEYS.items():
        section, _, name = path.partition(".")
        if (
            section == role
            and leaf.key.unit == "file"
            and not leaf.key.made
            and name != "policy"
            and (value := getattr(getattr(loaded, section), name))
        ):
            yield name, value


@pytest.mark.parametrize("role", ALL)
def test_probes_ask_the_admin_address(role: str, tmp_path: Path) -> None:
    """Every probe asks a path that exists, at the port and on the address where the role listens."""
    pod = workload(role)
    host, port = parse_endpoint(getattr(load(toml_in_pod(role), tmp_path, pod.environ), role).admin)
    assert len(pod.probes) >= 2
    for probe in pod.probes:
        ask = probe["httpGet"]
        assert pod.ports.get(ask["port"], ask["port"]) == port
        assert ask["path"] in ("/livez", "/readyz")
        assert ask.get("host") == ("127.0.0.1" if role == "agent" else None)
    assert host == ("127.0.0.1" if role == "agent" else "0.0.0.0")
    assert pod.container["livenessProbe"]["httpGet"]["path"] == "/livez", "a restart does not bring Redis back"


def test_identity_comes_from_the_downward_api() -> None:
    """A broker is its pod at the pod's IP on its machine; an agent is its machine."""
    fields = {
        entry["name"]: entry["valueFrom"]["fieldRef"]["fieldPath"]
        for role in ROLES
        for entry in workload(role).container["env"]
        if "fieldRef" in entry["valueFrom"]
    }
    assert fields == {
        "RTUNNEL_BROKER_NODE_ID": "metadata.name",
        "RTUNNEL_BROKER_HOST": "spec.nodeName",
        "RTUNNEL_BROKER_ADVERTISE_IP": "status.podIP",
        "RTUNNEL_AGENT_AGENT_ID": "spec.nodeName",
        "RTUNNEL_AGENT_ADDRESSES": "status.hostIP",
        "RTUNNEL_GATEWAY_NAME": "metadata.name",
    }


def stopping(config: Config, role: str) -> float:
    """Seconds from SIGTERM to the end of a role's drain."""
    return float(getattr(config, role).drain + (config.gateway.lame_duck if role == "gateway" else 0.0))


@pytest.mark.parametrize("role", ROLES)
def test_pods_may_drain(role: str, tmp_path: Path) -> None:
    """The grace period is longer than preStop, drain and what comes after it."""
    pod = workload(role)
    drain = stopping(load(toml_in_pod(role), tmp_path, pod.environ), role)
    pause = pod.container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    assert pod.pod["terminationGracePeriodSeconds"] >= pause + drain + MARGIN[role]


def test_services_lead_to_ports_that_listen(tmp_path: Path) -> None:
    """Service ports are container ports, and those are the ports of the configuration."""
    seen = {}
    for folder in FOLDERS:
        pods = {each.name: each for each in workloads(folder)}
        for service in of_kind(folder, "Service"):
            (port,) = service["spec"]["ports"]
            name = service["metadata"]["name"]
            assert pods[name].ports[port["targetPort"]] == port["port"]
            seen[name] = port["port"]
    for role in ("broker", "gateway", "authority"):
        loaded = load(toml_in_pod(role), tmp_path, workload(role).environ)
        assert parse_endpoint(getattr(loaded, role).listen) == ("0.0.0.0", seen[f"rtunnel-{role}"])
        if role != "authority":
            host, port = parse_endpoint(getattr(loaded, role).authority)
            assert (host, port) == ("rtunnel-authority", seen[host])
    seen = {name: port for name, port in seen.items() if name.removeprefix("rtunnel-") not in ALL}
    redis = next(iter(SECRETS.values())).rpartition("@")[2]
    assert seen == {"rtunnel-redis": int(redis.partition(":")[2].partition("/")[0])}


def test_the_vip_gives_agents_a_choice_of_node() -> None:
    """The brokers' VIP pins nobody, and no two brokers share a machine."""
    (service,) = [each for each in of_kind("centre", "Service") if each["metadata"]["name"] == "rtunnel-broker"]
    assert service["spec"]["type"] == "LoadBalancer"
    assert service["spec"]["sessionAffinity"] == "None"
    assert service["spec"]["externalTrafficPolicy"] == "Cluster"
    apart = workload("broker").pod["topologySpreadConstraints"][0]
    assert apart["topologyKey"] == "kubernetes.io/hostname"
    assert (apart["maxSkew"], apart["whenUnsatisfiable"]) == (1, "DoNotSchedule")
    assert workload("broker").manifest["spec"]["replicas"] >= 3, "two must be left when one is down"


def policies() -> dict[str, Manifest]:
    return {each["metadata"]["name"]: each["spec"] for folder in FOLDERS for each in of_kind(folder, "NetworkPolicy")}


def test_the_namespace_is_closed_by_default() -> None:
    """One policy closes every pod of the centre; the others open."""
    assert policies()["rtunnel-closed"] == {"podSelector": {}, "policyTypes": ["Ingress"]}


def test_policies_open_what_brokers_need(tmp_path: Path) -> None:
    """Links from anywhere, guarded ports from gateways only, and exactly the range of the configuration."""
    broker = load(toml_in_pod("broker"), tmp_path, workload("broker").environ).broker
    first, last = parse_range(broker.port_range)
    links, guarded = policies()["rtunnel-broker"]["ingress"]
    assert links == {"ports": [{"protocol": "TCP", "port": parse_endpoint(broker.listen)[1]}]}
    assert guarded["ports"] == [{"protocol": "TCP", "port": first, "endPort": last}]
    assert guarded["from"] == [{"podSelector": {"matchLabels": workload("gateway").labels}}]


def test_policies_say_who_may_use_a_gateway(tmp_path: Path) -> None:
    """The same networks in the policy and in the Service, which keeps the clients' addresses."""
    (rule,) = policies()["rtunnel-gateway"]["ingress"]
    (service,) = [each for each in of_kind("centre", "Service") if each["metadata"]["name"] == "rtunnel-gateway"]
    networks = [source["ipBlock"]["cidr"] for source in rule["from"] if "ipBlock" in source]
    assert networks == service["spec"]["loadBalancerSourceRanges"]
    assert "0.0.0.0/0" not in networks
    assert service["spec"]["externalTrafficPolicy"] == "Local"
    listen = load(toml_in_pod("gateway"), tmp_path, workload("gateway").environ).gateway.listen
    assert rule["ports"] == [{"protocol": "TCP", "port": parse_endpoint(listen)[1]}]


def test_policies_open_redis_to_brokers_and_gateways() -> None:
    """The example Redis talks to who reads or writes tuples, and to nobody else."""
    (rule,) = policies()["rtunnel-redis"]["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": workload(role).labels}} for role in ("broker", "gateway")]
    assert [port["port"] for port in rule["ports"]] == list(workload("redis").ports.values())


def test_the_authority_is_alone_and_hears_brokers_and_gateways(tmp_path: Path) -> None:
    """One pod, never two, on a volume that outlives it; its port is open to who asks it, and to nobody else."""
    pod = workload("authority")
    assert pod.manifest["spec"]["replicas"] == 1
    assert pod.manifest["spec"]["strategy"] == {"type": "Recreate"}
    directory = load(toml_in_pod("authority"), tmp_path, {}).authority.directory
    (claim,) = [volume for volume in pod.pod["volumes"] if "persistentVolumeClaim" in volume]
    (mount,) = [mount for mount in pod.container["volumeMounts"] if mount["name"] == claim["name"]]
    assert Path(directory).parent == Path(mount["mountPath"])
    (made,) = of_kind("centre", "PersistentVolumeClaim")
    assert claim["persistentVolumeClaim"]["claimName"] == made["metadata"]["name"]
    (rule,) = policies()["rtunnel-authority"]["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": workload(role).labels}} for role in ("broker", "gateway")]
    assert [port["port"] for port in rule["ports"]] == [pod.ports["ask"]]


def test_the_authority_makes_its_directory_once(tmp_path: Path) -> None:
    """The init container's command, run here: it makes the directory, and the second time nothing."""
    (init,) = workload("authority").pod["initContainers"]
    (directory,) = set(re.findall(r"/var/lib/rtunnel/\S+", init["command"][-1]))
    words = [word.replace(directory, str(tmp_path / "pki")) for word in init["command"]]
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(words, check=True, capture_output=True, env=environ)
    key = (tmp_path / "pki" / "ca.key").read_bytes()
    subprocess.run(words, check=True, capture_output=True, env=environ)
    assert (tmp_path / "pki" / "ca.key").read_bytes() == key


def test_agents_run_everywhere() -> None:
    """On every host, whatever its taints, in its network, with names of the cluster still resolved."""
    pod = workload("agent").pod
    assert workload("agent").manifest["kind"] == "DaemonSet"
    assert pod["tolerations"] == [{"operator": "Exists"}]
    assert pod["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert "ports" not in workload("agent").container, "with the host's network each would be a port of the host"


def test_the_namespaces_allow_their_pods() -> None:
    """Pod Security: restricted where it can be; agents need the host's network."""
    levels = {
        each["metadata"]["name"]: each["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        for folder in FOLDERS
        for each in of_kind(folder, "Namespace")
    }
    assert levels == {"rtunnel": "restricted", "rtunnel-agent": "privileged"}


# --- docs/deploy.md ---------------------------------------------------------------------------------------


def commands() -> list[list[str]]:
    """The words of every shell line of docs/deploy.md."""
    return list(shell_lines((ROOT / "docs" / "deploy.md").read_text()))


def test_documented_secrets_are_those_that_pods_mount(secrets: Path) -> None:
    """The page's `kubectl create secret` commands make every Secret and key that a manifest refers to."""
    made: dict[tuple[str, str], set[str]] = {}
    for words in commands():
        if words[0] == "kubectl" and words[3:6] == ["create", "secret", "generic"]:
            options = [word.removeprefix("--from-").split("=") for word in words[7:]]
            made[words[2], words[6]] = {Path(value).name for _, value, *_ in options}
            assert all((secrets / Path(value).name).exists() for kind, value, *_ in options if kind == "file")
    needed: dict[tuple[str, str], set[str]] = {}
    for each in [each for folder in FOLDERS for each in workloads(folder)]:
        namespace = each.manifest["metadata"]["namespace"]
        for volume in each.pod["volumes"]:
            if secret := volume.get("secret"):
                needed.setdefault((namespace, secret["secretName"]), set()).update(i["key"] for i in secret["items"])
        for entry in each.container.get("env", []):
            if reference := entry["valueFrom"].get("secretKeyRef"):
                needed.setdefault((namespace, reference["name"]), set()).add(reference["key"])
    assert made == needed


def test_documented_commands_exist() -> None:
    """Every file of this repository that the page uses is there, and every rtunnel command is one."""
    seen = set()
    for words in commands():
        assert all((ROOT / word).exists() for word in words if word.startswith("deploy/")), words
        # `kubectl exec POD -- rtunnel status` is one of ours too.
        ours = words[words.index("--") + 1 :] if "--" in words else words
        if Path(ours[0]).name == "rtunnel":
            seen.add(command_of(ours[1:]).name)
    assert {"init", "check", "status"} <= seen


# --- systemd ----------------------------------------------------------------------------------------------


Unit = dict[str, dict[str, list[str]]]


def unit(role: str) -> Unit:
    """Section -> key -> its values: a unit repeats keys, which configparser can't hold."""
    sections: Unit = {}
    current: dict[str, list[str]] = {}
    for line in (DEPLOY / "systemd" / f"rtunnel-{role}.service").read_text().splitlines():
        if line.startswith("["):
            current = sections.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            key, equals, value = line.partition("=")
            assert equals and not line.endswith("\\"), line
            current.setdefault(key, []).append(value)
    return sections


def service(role: str, key: str) -> str:
    (value,) = unit(role)["Service"][key]
    return value


def example(role: str) -> str:
    return (DEPLOY / "config" / f"{role}.toml").read_text()


@pytest.mark.parametrize("role", ALL)
def test_units_run_their_role(role: str) -> None:
    """ExecStart is a command of the CLI with the file that this page installs."""
    program, *words = service(role, "ExecStart").split()
    assert program == "/opt/rtunnel/bin/rtunnel"
    assert words == [role, "--config", f"/etc/rtunnel/{role}.toml"]
    assert command_of(words).name == role
    assert service(role, "Restart") == "always"
    assert service(role, "Type") == "notify"
    assert float(service(role, "WatchdogSec")) > SILENCE, "a supervisor has replaced its silent workers by then"
    assert service(role, "WatchdogSignal") == "SIGKILL"
    assert unit(role)["Unit"]["StartLimitIntervalSec"] == ["0"]
    assert service(role, "RestartPreventExitStatus") == str(errors.EXIT_USAGE)
    assert unit(role)["Install"]["WantedBy"] == ["multi-user.target"]


@pytest.mark.parametrize("role", ROLES)
def test_units_may_drain(role: str, tmp_path: Path) -> None:
    """SIGTERM, and more time than drain takes before the kill."""
    drain = stopping(load(example(role), tmp_path, {}), role)
    assert service(role, "KillSignal") == "SIGTERM"
    assert float(service(role, "TimeoutStopSec")) >= drain + MARGIN[role]


def test_units_have_descriptors() -> None:
    """Limits are within the kernel's default maximum, and enough for the sessions and clients that a role allows."""
    limits = {role: int(service(role, "LimitNOFILE")) for role in ROLES}
    assert max(limits.values()) <= 1048576, "fs.nr_open"
    defaults = Config()
    # As docs/deploy.md counts them: a session, a stream, connections that have not said what they want.
    assert limits["broker"] > 2 * defaults.broker.max_sessions + 2 * defaults.broker.max_handshakes + 500_000
    assert limits["gateway"] > 2 * defaults.gateway.max_clients + 96
    assert limits["agent"] >= 65536
    assert int(service("authority", "LimitNOFILE")) > 2 * MAX_CONNECTIONS


@pytest.mark.parametrize("role", ALL)
def test_units_hand_over_the_secrets(role: str, tmp_path: Path) -> None:
    """Each file of the configuration is a credential, and the variable of its key points to it."""
    credentials = dict(value.split(":", 1) for value in unit(role)["Service"].get("LoadCredential", []))
    variables = dict(value.split("=", 1) for value in unit(role)["Service"]["Environment"])
    expected = {}
    for key, path in _files(load(example(role), tmp_path, {}), role):
        source = Path("/etc/rtunnel") / Path(path).relative_to(tmp_path)
        variable = variables.pop(KEYS[f"{role}.{key}"].env)
        assert credentials[variable.removeprefix("%d/")] == str(source)
        expected[source.name] = str(source)
    assert credentials == expected
    assert variables == STATE.get(role, {})
    assert unit(role)["Service"].get("StateDirectory", []) == [f"rtunnel-{role}"] * bool(STATE.get(role))
    assert unit(role)["Service"].get("StateDirectoryMode", []) == ["0700"] * bool(STATE.get(role))


@pytest.mark.parametrize("role", ALL)
def test_units_are_hardened(role: str) -> None:
    """No user of its own on the machine, no capability, nothing to write but the role's own folder."""
    wanted = {
        "DynamicUser": "yes",
        "NoNewPrivileges": "yes",
        "CapabilityBoundingSet": "",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "PrivateDevices": "yes",
        "RestrictNamespaces": "yes",
        "SystemCallArchitectures": "native",
    }
    assert {key: service(role, key) for key in wanted} == wanted
    assert not {"ReadWritePaths", "AmbientCapability"} & set(unit(role)["Service"])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    """systemd-analyze finds no fault, with an ExecStart that exists here."""
    program = tmp_path / "rtunnel"
    program.touch(mode=0o755)
    copies = []
    for role in ALL:
        source = DEPLOY / "systemd" / f"rtunnel-{role}.service"
        copy = tmp_path / source.name
        copy.write_text(source.read_text().replace("/opt/rtunnel/bin/rtunnel", str(program)))
        copies.append(str(copy))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *copies], capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if "rtunnel" in line]
    assert complaints == []


@pytest.mark.parametrize("role", ALL)
def test_examples_could_start(role: str, tmp_path: Path, secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """deploy/config/*.toml beside the folder of `pki init` is all that a role needs, with nothing to warn of."""
    assert secrets == tmp_path / "pki"
    shutil.copy(DEPLOY / "config" / "policy.toml", tmp_path)
    text = example(role).replace("/var/lib/rtunnel-authority/pki", str(secrets))
    monkeypatch.setattr(preflight, "descriptor_limit", lambda: int(service(role, "LimitNOFILE")))
    assert roles.check(load(text, tmp_path, {}), role) == []


def test_examples_name_one_authority(tmp_path: Path) -> None:
    """Brokers and gateways ask where the authority listens."""
    listen = load(example("authority"), tmp_path, {}).authority.listen
    assert load(example("broker"), tmp_path, {}).broker.authority == listen
    assert load(example("gateway"), tmp_path, {}).gateway.authority == listen


# --- the image --------------------------------------------------------------------------------------------


def dockerfile() -> list[list[str]]:
    """The instructions, each split at spaces; continued lines are joined."""
    text = (DEPLOY / "Dockerfile").read_text()
    text = re.sub(r"^#.*\n", "", text, flags=re.M).replace("\\\n", " ")
    return [line.split() for line in text.splitlines() if line.strip()]


def project() -> Manifest:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_image_is_built_from_what_the_wheel_needs() -> None:
    """Every folder and file of the wheel is copied, and let through by the ignore file."""
    copied = {
        word.rstrip("/") for words in dockerfile() if words[0] == "COPY" and "--from=build" not in words
        for word in words[1:-1]
    }  # fmt: skip
    built = project()["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = {package.partition("/")[0] for package in built} | {"pyproject.toml"}
    needed |= {project()["project"]["readme"], *project()["project"]["license-files"]}
    assert copied == needed
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == needed
    assert all((ROOT / name).exists() for name in needed)


def test_the_image_runs_rtunnel_without_root() -> None:
    """A numeric user, which the manifests agree with; rtunnel is the entry point; no HEALTHCHECK."""
    words = {line[0]: line[1:] for line in dockerfile()}
    user = workload("broker").pod["securityContext"]
    assert words["USER"] == [f"{user['runAsUser']}:{user['runAsGroup']}"]
    assert words["ENTRYPOINT"] == ['["rtunnel"]']
    assert "HEALTHCHECK" not in words
    assert words["EXPOSE"] == [str(workload("broker").ports["links"]), str(workload("gateway").ports["proxy"])]
    least = tuple(map(int, project()["project"]["requires-python"].removeprefix(">=").split(".")))
    assert tuple(map(int, words["ARG"][0].removeprefix("PYTHON=").split("."))) >= least


def test_manifests_run_this_version() -> None:
    """The image's tag is the version of this source, in manifests, Dockerfile and page."""
    images = {workload(role).container["image"] for role in ALL}
    assert images == {f"registry.example/rtunnel:{rtunnel.__version__}"}
    assert set(re.findall(r"registry\.example/rtunnel:[\w.]+", (DEPLOY / "Dockerfile").read_text())) == images
    page = (ROOT / "docs" / "deploy.md").read_text()
    assert set(re.findall(r"registry\.example/rtunnel:[\w.]+", page)) == images
    assert f"rtunnel-{rtunnel.__version__}-py3-none-any.whl" in page


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this source without network."""
    if find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    script = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", script, str(folder)], cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_all_packages(wheel: Path) -> None:
    """Five import packages at the top and every module of them; the command; the roles; nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(f"rtunnel-{rtunnel.__version__}.dist-info/entry_points.txt").decode()
    assert {name.partition("/")[0] for name in names} == {
        "rtunnel", "rtunnel_agent", "rtunnel_authority", "rtunnel_broker", "rtunnel_socks",
        f"rtunnel-{rtunnel.__version__}.dist-info",
    }  # fmt: skip
    for package in project()["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        source = ROOT / package
        modules = {path.relative_to(source.parent).as_posix() for path in source.rglob("*.py")}
        assert modules <= names
        assert f"{source.name}/py.typed" in names, "type checkers ignore a package without it"
    assert "rtunnel = rtunnel.cli:main" in entry_points
    for role, target in project()["project"]["entry-points"][roles.GROUP].items():
        assert f"{role} = {target}" in entry_points


#: Checks the configuration of each role, and asks the role for its help.
ALL_ROLES = """
import sys
from rtunnel.cli import cli
for role in sys.argv[1:]:
    cli.main(["config", "check", f"{role}.toml", "--role", role], standalone_mode=False)
    cli.main([role, "--help"], standalone_mode=False)
"""


def test_the_installed_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    """In a fresh venv the command tells its version, knows the roles, and makes and checks a cluster's files."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "-q"]
    subprocess.run([*install, "--disable-pip-version-check", str(wheel)], check=True, capture_output=True)
    # Its dependencies are those of this environment; this source itself is editable there, which a path does not bring.
    (site,) = home.glob("lib/python*/site-packages")
    ours = Path(click.__file__).parents[1]
    (site / "dependencies.pth").write_text(f"{ours}\n")

    def run(*words: str, program: str = "rtunnel") -> str:
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("RTUNNEL_", "PYTHON"))}
        command = [str(home / "bin" / program), *words]
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("-c", "import rtunnel; print(rtunnel.__file__)", program="python").startswith(str(site))
    assert run("--version") == f"rtunnel {rtunnel.__version__}\n"
    run("pki", "init", "pki")
    shutil.copy(DEPLOY / "config" / "policy.toml", tmp_path)
    for role in ROLES:
        (tmp_path / f"{role}.toml").write_text(example(role))
    # One process for all roles: most of the time of each would be imports.
    said = run("-c", ALL_ROLES, *ROLES, program="python")
    for role in ROLES:
        assert f"good for {role}" in said
    assert "can't be used" not in said

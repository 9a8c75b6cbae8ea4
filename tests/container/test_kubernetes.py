# SPDX-License-Identifier: GPL-3.0-only
"""The manifests in deploy/kubernetes are valid, and their Pods really count connections.

kubectl renders them, kubernetes-validate checks them, podman runs them. No cluster is
required.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.container.podman import (
    BPF,
    PORT,
    established,
    get,
    is_a_process_hidden,
    pid_of,
    podman,
    running,
)
from tests.container.pods import (
    APP_PORT,
    KUBERNETES,
    ROOT,
    objects,
    options_of,
    playing,
    pod_of,
    probes_of,
    render,
    unique,
)
from tests.e2e.support import Prometheus
from tests.support import ESTABLISHED, Peers, eventually, inside

EXAMPLES = ("node", "all-pods", "app", "app-native")
OVERLAYS = [
    KUBERNETES / "daemonset",
    *(KUBERNETES / "examples" / each for each in EXAMPLES),
]
SIDECARS = pytest.mark.parametrize("example", ["app", "app-native"])


def example(name: str) -> dict[str, dict[str, Any]]:
    return objects(KUBERNETES / "examples" / name)


def exporter_of(workload: dict[str, Any]) -> dict[str, Any]:
    """Return the container of the exporter in a workload."""
    spec = workload["spec"]["template"]["spec"]
    (found,) = (
        each
        for each in [*spec["containers"], *spec.get("initContainers", [])]
        if each["name"] == "tcpexporter"
    )
    assert isinstance(found, dict)
    return found


# --- Manifests ---


def test_every_overlay_is_tested() -> None:
    """A new example must be in the list above."""
    found = {each.parent for each in KUBERNETES.glob("examples/*/kustomization.yaml")}
    assert found - {KUBERNETES / "examples" / "deployment"} == set(OVERLAYS[1:])


@pytest.mark.parametrize("version", ["1.29", "1.37"])
@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda each: each.name)
def test_an_overlay_is_valid(overlay: Path, version: str, tmp_path: Path) -> None:
    """No property is unknown to that version of Kubernetes.

    There is no schema for the objects of the Prometheus Operator.
    """
    path = tmp_path / "rendered.yaml"
    path.write_text(render(overlay))
    done = subprocess.run(
        [
            Path(sys.executable).with_name("kubernetes-validate"),
            *("--strict", "--no-warn", "--kubernetes-version", version, path),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_alert_rules_are_those_of_prometheus() -> None:
    """`make documents` generates them."""
    rules = yaml.safe_load((ROOT / "deploy/prometheus/tcpexporter.rules.yml").read_text())
    assert example("node")["PrometheusRule"]["spec"]["groups"] == rules["groups"]


def test_the_service_monitor_selects_the_daemon_set() -> None:
    """The job has the name that the alert rules expect: that of the Service."""
    found = example("node")
    service, monitor = found["Service"], found["ServiceMonitor"]
    labels = monitor["spec"]["selector"]["matchLabels"]
    assert labels.items() <= service["metadata"]["labels"].items()
    assert service["metadata"]["name"] == "tcpexporter"
    template = found["DaemonSet"]["spec"]["template"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    (port,) = service["spec"]["ports"]
    assert [each["port"] for each in monitor["spec"]["endpoints"]] == [port["name"]]
    (opened,) = exporter_of(found["DaemonSet"])["ports"]
    assert port["targetPort"] == opened["name"]


@SIDECARS
def test_the_pod_monitor_and_the_policy_select_the_sidecar(example: str) -> None:
    """The alert on a degraded source leaves its target out."""
    found = objects(KUBERNETES / "examples" / example)
    monitor, policy = found["PodMonitor"]["spec"], found["NetworkPolicy"]["spec"]
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    (endpoint,) = monitor["podMetricsEndpoints"]
    (port,) = exporter_of(found["Deployment"])["ports"]
    assert endpoint["port"] == port["name"]
    added = {each["targetLabel"]: each["replacement"] for each in endpoint["relabelings"]}
    assert added == {"job": "tcpexporter", "polling": "intended"}
    restricted = policy["ingress"][-1]
    assert [each["port"] for each in restricted["ports"]] == [port["containerPort"]]


@SIDECARS
def test_a_sidecar_does_not_change_the_application(example: str) -> None:
    """It only adds a container and a label, and it cannot make the pod unready."""
    plain = objects(KUBERNETES / "examples" / "deployment")["Deployment"]
    changed = objects(KUBERNETES / "examples" / example)["Deployment"]
    added = exporter_of(changed)
    assert "readinessProbe" not in added
    spec = changed["spec"]["template"]["spec"]
    spec["containers"] = [each for each in spec["containers"] if each != added]
    spec.pop("initContainers", None)
    del changed["spec"]["template"]["metadata"]["labels"]["tcpexporter"]
    assert changed == plain


# --- Pods ---


def daemon(name: str, pins: str) -> dict[str, Any]:
    """Return the Pod of a DaemonSet, with pins of its own."""
    workload = example(name)["DaemonSet"]
    container = exporter_of(workload)
    assert container["args"][0] == "--pin=/sys/fs/bpf/tcpexporter"
    container["args"][0] = f"--pin={pins}"
    return pod_of(workload, unique(name))


def lines() -> list[str]:
    return (get("/metrics") or "").splitlines()


def test_the_daemon_set_counts_and_keeps_counters_over_an_update(
    pins: str, tmp_path: Path
) -> None:
    """The second Pod adopts what the kernel recorded before it started.

    A real Prometheus scrapes both. The log has no warning.
    """
    pod = daemon("node", pins)
    with Peers() as peers:
        labels = f'{{port="{peers.port}",tcp_version="4"}}'
        for number in (1, 2):
            with playing(pod) as exporter:
                exporter.wait_until_ready()
                peers.connect(3)
                established = f"tcp_established_connections{labels} {number * 5 - 2}.0"
                eventually(lambda wanted=established: wanted in lines())  # type: ignore[misc]
                opened = f"tcp_connections_opened_total{labels} {number * 5 - 2}.0"
                assert opened in lines()
                assert 'tcpexporter_source_info{source="ebpf"} 1.0' in lines()
                for by in ("seccomp", "unprivileged_user", "no_capabilities"):
                    assert f'tcpexporter_confined{{by="{by}"}} 1.0' in lines()
                assert not exporter.warnings()
                for path in probes_of(exporter_of(example("node")["DaemonSet"])):
                    assert get(path)
                with Prometheus(tmp_path, f"127.0.0.1:{PORT}") as prometheus:
                    query = f'{ESTABLISHED}{{port="{peers.port}"}}'
                    prometheus.wait_for(query, {("tcpexporter",): number * 5 - 2}, "job")
            peers.connect(2)  # while no Pod runs


@SIDECARS
def test_a_sidecar_counts_the_connections_of_its_pod(example: str, tmp_path: Path) -> None:
    """It requires no capability and no mount. The application opens the connections.

    A real Prometheus scrapes it.
    """
    workload = objects(KUBERNETES / "examples" / example)["Deployment"]
    pod = pod_of(workload, unique(example))
    wanted = f'tcp_established_connections{{port="{APP_PORT}",tcp_version="4"}} 5.0'
    with playing(pod, "--network=none") as exporter:
        with inside(f"/proc/{pid_of(exporter.container)}/ns/net"):
            exporter.wait_until_ready()
            eventually(lambda: wanted in lines())
            assert 'tcpexporter_source_info{source="sock_diag"} 1.0' in lines()
            for path in probes_of(exporter_of(workload)):
                assert get(path)
            with Prometheus(tmp_path, f"127.0.0.1:{PORT}") as prometheus:
                query = f'{ESTABLISHED}{{port="{APP_PORT}"}}'
                prometheus.wait_for(query, {("tcpexporter",): 5}, "job")
        assert not exporter.warnings()


def test_the_daemon_set_counts_the_connections_of_all_pods(pins: str) -> None:
    """The label container is the id of the other Pod's container, as podman shows it.

    The label pod is empty: the cgroup of a Pod of podman has no uid of Kubernetes.
    """
    other = pod_of(example("app")["Deployment"], unique("other"))
    with playing(other, "--network=none") as sidecar:
        app = sidecar.container.replace("-tcpexporter", "-app")
        container = podman("inspect", "--format={{.Id}}", app)[:12]
        pod = daemon("all-pods", pins)
        arguments = tuple(pod["spec"]["containers"][0]["args"])
        with running(BPF, *options_of(pod), arguments=arguments) as exporter:
            exporter.wait_until_ready()
            labels = {"port": str(APP_PORT), "container": container, "pod": ""}
            eventually(lambda: established(**labels, tcp_version="4") == 5)
            assert len(exporter.warnings()) == is_a_process_hidden()

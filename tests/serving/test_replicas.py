"""The example of several replicas: its manifest, its image and its router say what the server does."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from nemodiff.commands.serve import serve
from nemodiff.serving.metrics import METRICS

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve"
FLAGS = {flag for param in serve.params for flag in param.opts}


def test_the_manifest_holds_together() -> None:
    parts = {part["kind"]: part for part in yaml.safe_load_all((EXAMPLE / "kubernetes.yaml").read_text())}
    deployment = parts["Deployment"]["spec"]
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    labels = deployment["template"]["metadata"]["labels"]
    assert parts["Service"]["spec"]["selector"] == deployment["selector"]["matchLabels"] == labels
    (port,) = container["ports"]
    assert parts["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in ("/health", "/health/ready")
        assert container[probe]["httpGet"]["port"] == port["name"]
    waits = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    drain = int(container["args"][container["args"].index("--drain") + 1])
    assert pod["terminationGracePeriodSeconds"] > waits + drain
    scaler = parts["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == parts["Deployment"]["metadata"]["name"]
    assert "replicas" not in deployment  # or an update would undo the autoscaler
    (metric,) = scaler["metrics"]
    assert metric["pods"]["metric"]["name"] in {metric.name for metric in METRICS}


@pytest.mark.parametrize("release", ["1.27", kubernetes_validate.latest_version()])
def test_the_manifest_is_what_kubernetes_takes(release: str) -> None:
    kinds = set()
    for part in yaml.safe_load_all((EXAMPLE / "kubernetes.yaml").read_text()):
        if part["kind"] != "PodMonitor":  # of the Prometheus operator
            kubernetes_validate.validate(part, release, strict=True)
            kinds.add(part["kind"])
    assert kinds == {"Service", "Deployment", "HorizontalPodAutoscaler", "PodDisruptionBudget", "Ingress"}


def test_the_image_starts_the_server_with_flags_that_it_has() -> None:
    text = (EXAMPLE / "Dockerfile").read_text()
    entry = json.loads(re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[0])
    words = [*entry, *json.loads(re.findall(r"^CMD (.*)$", text, re.MULTILINE)[0])]
    assert words[:2] == ["nemodiff", "serve"]
    assert {word for word in words if word.startswith("--")} < FLAGS
    (shell,) = re.findall(r"^RUN (.*)$", text, re.MULTILINE)
    subprocess.run(["bash", "-n", "-c", shell], check=True)


def test_what_images_leave_out_is_no_part_of_the_package() -> None:
    root = EXAMPLE.parents[1]
    left_out = {line for line in (root / ".dockerignore").read_text().splitlines() if not line.startswith("#")}
    declared = tomllib.loads((root / "pyproject.toml").read_text())
    rooms = {name.split(".")[1] for name in declared["tool"]["setuptools"]["packages"] if "." in name}
    files = {declared["project"]["readme"], *declared["project"]["license-files"], "pyproject.toml"}
    assert not left_out & (rooms | files)
    assert {"engines", "tests"} < left_out

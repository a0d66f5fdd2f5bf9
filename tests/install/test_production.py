"""docs/production.md: systemd takes the unit, Kubernetes takes the manifest, and what both start is a line of
msconv's."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from msconv.cli import cli
from tests.docs.pages import ROOT, blocks
from tests.install.environments import HERE, environment

INSTALL = pytest.mark.skipif(not os.environ.get("MSCONV_INSTALL"), reason="`make test-install` checks them")
PROBES = {"/health", "/health_generate"}


def block(language: str) -> str:
    """The one block of the page that is in this language."""
    (found,) = [b.text for b in blocks((ROOT / "docs" / "production.md").read_text()) if b.language == language]
    return found


def container() -> dict[str, Any]:
    (found,) = yaml.safe_load(block("yaml"))["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def starts_a_server(words: list[str]) -> None:
    assert words[1] == "serve"
    command = cli.get_command(click.Context(cli), "serve")
    assert command
    assert command.make_context("serve", words[2:]).params["host"] == "0.0.0.0"


def test_the_unit_starts_a_server_that_can_write_where_it_must() -> None:
    unit = dict(line.split("=", 1) for line in block("ini").splitlines() if "=" in line)
    starts_a_server(shlex.split(unit["ExecStart"]))
    assert unit["ProtectSystem"] == "strict"  # nothing may be written but what is named:
    assert unit["PrivateTmp"] == "yes"  # SGLang's processes meet in files there
    assert unit["WorkingDirectory"] == f"/var/lib/{unit['StateDirectory']}"
    assert f"Environment=HOME=/var/lib/{unit['StateDirectory']}" in block("ini")


def test_the_manifest_starts_a_server_and_asks_it_what_it_answers() -> None:
    server = container()
    starts_a_server(server["command"])
    probes = [server[name]["httpGet"] for name in ("readinessProbe", "startupProbe", "livenessProbe")]
    assert {probe["path"] for probe in probes} <= PROBES
    assert {probe["port"] for probe in probes} == {server["ports"][0]["containerPort"]} == {30000}


@pytest.mark.slow
@INSTALL
@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not on this machine")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    def said_of(text: str) -> str:
        path = tmp_path / "msconv.service"
        path.write_text(text.replace("/opt/msconv/bin/msconv", sys.executable))
        done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True)
        return done.stdout + done.stderr

    assert said_of(block("ini")) == ""
    assert "Restat" in said_of(block("ini").replace("Restart=", "Restat="))


@pytest.mark.slow
@INSTALL
def test_kubernetes_takes_the_manifest(tmp_path: Path) -> None:
    path = tmp_path / "deployment.yaml"
    with environment(tmp_path / "env") as env:
        env.install("-r", HERE / "kubernetes.txt")
        path.write_text(block("yaml"))
        done = env.run("kubernetes-validate", "--strict", path)
        assert done.returncode == 0, done.stdout + done.stderr
        path.write_text(re.sub(r"periodSeconds: 15", "periodSecond: 15", block("yaml")))
        assert env.run("kubernetes-validate", "--strict", path).returncode != 0

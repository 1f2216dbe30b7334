"""A run that records offline asks nobody beyond this machine for anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Python imports it at the start of every process; audit hooks see every call of the socket module.
WATCH = """
import ipaddress, os, sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto"):
        address = arguments[1]
        if isinstance(address, tuple) and not ipaddress.ip_address(address[0]).is_loopback:
            note(event, address)
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        if arguments[0] not in ("localhost", "127.0.0.1", "::1", None):
            note(event, arguments)

def note(event, what):
    with open(os.environ["WATCHED"], "a") as file:
        print(" ".join(sys.argv), event, what, file=file)

sys.addaudithook(watch)
"""


def watched(tmp_path: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """Run Python and note every address outside that it, or a process of its own, asks for."""
    (tmp_path / "watch").mkdir(exist_ok=True)
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH)
    notes = tmp_path / "notes"
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "watch"), "WATCHED": str(notes)},
    )  # fmt: skip
    return done, notes.read_text() if notes.exists() else ""


def test_an_address_outside_is_noted(tmp_path: Path):
    code = "import urllib.request; urllib.request.urlopen('http://192.0.2.1', timeout=0.1)"
    _, notes = watched(tmp_path, "-c", code)
    assert "192.0.2.1" in notes


@pytest.mark.process
def test_an_offline_run_opens_no_socket_beyond_this_machine(tiny: list[str], tmp_path: Path):
    overrides = [o for o in tiny if not o.startswith("run_dir")]
    done, notes = watched(
        tmp_path, "train.py", *overrides, f"hydra.run.dir={tmp_path}/run", "data.num_workers=1"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "run").glob("wandb/offline-run-*"))
    assert notes == ""

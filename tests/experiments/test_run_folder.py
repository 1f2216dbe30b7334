"""The claim on a run's folder, and a process that is killed."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.run import RunFolder
from tests.conftest import ROOT

HOLD = """
import sys
from pathlib import Path
from experiments.run import RunFolder

with RunFolder(Path(sys.argv[1])).claimed() as mine:
    print(mine, flush=True)
    input()
"""


@pytest.mark.process
def test_the_claim_of_a_killed_process_ends(tmp_path: Path):
    folder = RunFolder(tmp_path / "run")
    command = [sys.executable, "-c", HOLD, str(folder.path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        with folder.claimed() as mine:
            assert not mine
        other.kill()
    with folder.claimed() as mine:
        assert mine

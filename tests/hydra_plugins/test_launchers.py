"""Launchers of sweeps. `tests/prove_slurm.sh` proves one of them on a real Slurm."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class

from experiments.results import Results
from experiments.run import finished_runs
from tests.conftest import ROOT


@pytest.mark.parametrize("launcher", ["joblib", "slurm", "ray_cluster"])
def test_every_launcher_composes_and_takes_its_options(launcher: str):
    plugin = {"slurm": "submitit", "ray_cluster": "ray"}.get(launcher, launcher)
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher", reason="its extra is missing")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", [f"hydra/launcher={launcher}"], return_hydra_config=True)
    options = config.hydra.launcher
    get_class(options._target_)(**{key: options[key] for key in options if key != "_target_"})
    if launcher == "slurm":
        assert options.max_num_timeout > 0  # the default of the plugin is 0: no job is requeued
        assert options.signal_delay_s >= 60


@pytest.mark.process
def test_two_jobs_side_by_side_end_with_their_results(tiny: list[str], tmp_path: Path):
    command = ["train.py", "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "logger=csv"]
    command += ["norm=group,batch", f"hydra.sweep.dir={tmp_path}"]
    command += [override for override in tiny if not override.startswith("run_dir")]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = finished_runs(tmp_path)
    assert {Results.read(run).choices["norm"] for run in runs} == {"group", "batch"}


JOB = """
import os, signal
from hydra_plugins import slurm_launcher

def requeue(*_):  # in place of submitit's handler
    print("requeued", flush=True)
    raise SystemExit(-1)

def job(*_):
    worker = os.fork()
    if worker:
        os.waitpid(worker, 0)
    os.kill(os.getpid(), signal.SIGUSR2)  # the worker is signalled first, then the job
    if worker == 0:
        os._exit(0)
    print("goes on")

slurm_launcher.SlurmLauncher.__call__ = job
signal.signal(signal.SIGUSR2, requeue)
slurm_launcher.RequeuingSlurmLauncher()()
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="Slurm's signal")
def test_a_job_is_requeued_once_and_ends_at_once():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="its extra is missing")
    done = subprocess.run([sys.executable, "-c", JOB], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("requeued\n", 1), done.stderr

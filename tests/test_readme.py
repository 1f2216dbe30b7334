"""Every command of the README runs, on tiny data in place of the user's."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from omegaconf import DictConfig

import train
from tests.conftest import ROOT, write_brats, write_metastases

COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


def test_every_kind_of_command_is_known():
    assert len(COMMANDS) >= 8
    assert SWEEP in COMMANDS
    for command in COMMANDS:
        assert command.startswith(
            (
                "make ",
                *(
                    f"python {script}"
                    for script in ("doctor", "train", "predict", "evaluate", "-m ")
                ),
            )
        )


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make(command: str):
    """Run by hand and by CI: here, that the targets exist and what they would do."""
    done = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    started = {
        "demo": "python train.py",
        "test": "python -m pytest",
        "benchmark": "python -m experiments.benchmarks.hardware",
    }
    assert started[command.split()[1]] in done.stdout


def test_the_demo_makes_the_phantoms_that_the_configuration_asks_for(
    composed: Callable[..., DictConfig],
):
    done = subprocess.run(
        ["make", "demo", "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    asked = composed().data.data_set
    expected = f"{asked.root} --cases {asked.count} --spacing-mm {asked.spacing_mm}"
    assert f"-m datamodules.phantom {expected} " in done.stdout


# test_train.py runs it, and looks closer.
SWEEP = "python train.py -m model=aeunet norm=group,batch"
# test_krivov2018.py runs them.
DETECTION = {
    "python train.py experiment=detection",
    "python -m experiments.krivov2018 runs/detection",
    "python train.py experiment=krivov2018 data.data_set.root=METASTASES",
}
# test_null_report.py runs such a sweep, kills it, and runs it again.
NULL_REPORT = {
    command
    for command in COMMANDS
    if "experiment=null_report" in command or "experiments.null_report" in command
}
# test_figure_2.py draws a brain that fits the template.
FIGURE_2 = {command for command in COMMANDS if "experiments.figure_2" in command}
# One after the other, below.
EVALUATION = [command for command in COMMANDS if "frey2019" in command or "=segmented" in command]
# On phantoms of their own, below.
REAL_SCANS = [command for command in COMMANDS if "experiment=real_scans" in command]
ELSEWHERE = {SWEEP, *DETECTION, *NULL_REPORT, *FIGURE_2, *EVALUATION, *REAL_SCANS}


@pytest.mark.process
@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.startswith("python") and c not in ELSEWHERE]
)
def test_python(
    command: str, composed: Callable[..., DictConfig], tiny: list[str], brats: Path, tmp_path: Path
):
    if "RUN" in command:
        config = composed(*tiny, "logger=csv", "trainer=debug")
        train.train(config)
        for name in ("RUN", "DETECTOR"):
            command = re.sub(rf"runs/\w+/{name}", config.run_dir, command)
        command = command.replace("FOLDER", str(write_brats(tmp_path / "new", cases=1)))
    if "METASTASES" in command:
        write_metastases(tmp_path / "metastases" / "A", np.zeros((24, 24, 24), np.uint8))
        command = command.replace("METASTASES", str(tmp_path / "metastases"))
    command = command.replace("output=predictions", f"output={tmp_path}/out")
    words = shlex.split(command.replace("FOLDER", str(brats)))
    if "train.py" in words and "--help" not in words:
        ours = [o for o in tiny if not o.startswith(("run_dir", "data.data_set.root", "patches="))]
        ours += [f"hydra.run.dir={tmp_path}/run", f"hydra.sweep.dir={tmp_path}", "logger=csv"]
        words += [*ours, f"data.data_set.root={brats}", "filters.base=8", "trainer=debug"]
    if "datamodules.phantom" in words:
        words[3] = str(tmp_path / "phantoms")
        words[words.index("1")] = "4"
        words[words.index("100")] = "1"
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search(r"Traceback|Error", done.stderr)


@pytest.mark.process
@pytest.mark.parametrize("name", ["real_scans", "real_scans_metastases"])
def test_networks_for_real_scans_train_on_families_of_phantoms(name: str, tmp_path: Path):
    """One after the other, as the second for gliomas goes on from the first on finer voxels."""
    commands = [c for c in REAL_SCANS if f"experiment={name}" in shlex.split(c)]
    assert len(commands) == (2 if name == "real_scans" else 1)
    detects = name == "real_scans_metastases"
    shape = ["patches.size=68"] if detects else ["patches.size=16", "patches.window=16"]
    for number, command in enumerate(commands):
        command = command.replace(f"runs/{name}/RUN", f"{tmp_path}/run-{number - 1}")
        words = [
            *(word for word in shlex.split(command)[1:] if "spacing_mm" not in word),
            *(f"data.data_set.spacing_mm={6 - number}", f"data.cache.root={tmp_path}/cache"),
            *(f"data.data_set.root={tmp_path}/data-{number}", "data.data_set.count=3"),
            *("data.data_set.families=[creeping,swelling]", "filters.base=8", "logger=csv"),
            *(
                *shape,
                "split.validation=0",
                "split.test=0",
                f"hydra.run.dir={tmp_path}/run-{number}",
            ),
            *("patches.per_epoch=4", "patches.epochs=1", "patches.epochs_per_validation=1"),
        ]
        done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (tmp_path / f"run-{number}" / "best.ckpt").is_file()
        made = json.loads((tmp_path / f"data-{number}" / "phantoms.json").read_text())
        assert made["families"] == ["creeping", "swelling"]


@pytest.mark.process
def test_the_papers_evaluation(tiny: list[str], brats: Path, tmp_path: Path):
    """Train two models, evaluate them, segment new scans, score the label maps."""
    assert [shlex.split(command)[1] for command in EVALUATION] == [
        "train.py", "evaluate.py", "predict.py", "evaluate.py",
    ]  # fmt: skip
    replaced = ("run_dir", "data=", "data.data_set.root", "patches=")
    ours = [o for o in tiny if not o.startswith(replaced)]
    new = write_brats(tmp_path / "new", cases=2)
    for command in EVALUATION:
        for name in ("runs/frey2019", "=segmented", "=evaluation"):
            folder = f"{tmp_path}/{name.lstrip('=')}"
            command = command.replace(name, f"={folder}" if "=" in name else folder)
        words = shlex.split(command.replace("FOLDER", str(brats)).replace("NEW", str(new)))
        if "train.py" in words:
            words += [*ours, "filters.base=8", f"hydra.sweep.dir={tmp_path}/runs/frey2019"]
        elif "evaluate.py" in words:
            words += ["wandb=disabled"]
        done = subprocess.run(
            [sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "segmented").glob("*.nii.gz"))) == 2
    assert "| Mean |" in (tmp_path / "evaluation" / "table1.md").read_text()

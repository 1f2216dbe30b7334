"""The workspace of Weights & Biases, without a login."""

import json
import sys

import pytest

from errors import InputError
from experiments import dashboard


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # wandb-workspaces under Pydantic 2
def test_the_dashboard_groups_runs_by_factor_and_level(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("wandb_workspaces", reason="its extra is missing")
    dashboard.main(["me", "null_report", "--dry-run"])
    section = json.loads(capsys.readouterr().out)["spec"]["section"]
    (runs,) = section["runSets"]
    assert [key["name"] for key in runs["grouping"]] == ["cell.value.factor", "cell.value.level"]
    assert runs["filters"]["filters"][0]["value"] == "null_report"
    names = [part["name"] for part in section["panelBankConfig"]["sections"]]
    assert names[:2] == ["Scores", "Learning curves"]


def test_without_its_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.startswith("wandb_workspaces")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[dashboard\]'"):
        dashboard.main(["me", "null_report", "--dry-run"])

"""A Weights & Biases workspace for a sweep over factors: for users who are online.

`python -m experiments.dashboard ENTITY null_report` groups the runs of `runs/null_report` by factor
and level and saves a view of the project: scores, learning curves, losses, slices. It needs
`pip install -e '.[dashboard]'`, a login, and runs that were synced; `--dry-run` needs the first
alone, and prints the view.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

REGIONS = ("WT", "TC", "ET")
TERMS = ("train/loss_epoch", "train/l2_epoch", "train/kl_epoch", "val/loss")
LEVEL = "cell.level"


def workspace(entity: str, project: str, group: str) -> "Workspace":
    """The view of one group of runs; nothing is sent.

    Args:
        entity: Of Weights & Biases: a user or a team.
        project: Its project.
        group: The runs' group, the `name` of their sweep.
    """
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    level = reports.Config(LEVEL)
    scores: list = [
        reports.BarPlot(
            title=f"Test Dice {region}",
            metrics=[f"test/dice_{region}"],
            groupby=level,
            groupby_rangefunc="stddev",
            max_bars_to_show=50,
        )
        for region in REGIONS
    ]
    curves: list = [
        reports.LinePlot(
            title=f"Validation Dice {region}",
            x="epoch",
            y=[f"val/dice_{region}"],
            groupby=level,
            groupby_rangefunc="minmax",
        )
        for region in REGIONS
    ]
    losses: list = [
        reports.LinePlot(title=term, x="epoch", y=[term], groupby=level) for term in TERMS
    ]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=group,
        sections=[
            workspaces.Section("Scores", panels=scores, is_open=True),
            workspaces.Section("Learning curves", panels=curves, is_open=True),
            workspaces.Section("Losses", panels=losses),
            workspaces.Section("Slices", panels=[reports.MediaBrowser(media_keys=["val/slice"])]),
        ],
        runset_settings=workspaces.RunsetSettings(
            filters=[workspaces.Metric("group") == group],
            groupby=[workspaces.Config("cell.factor"), workspaces.Config(LEVEL)],
            order=[workspaces.Ordering(workspaces.Summary("test/dice"), ascending=False)],
        ),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.dashboard",
        description="Save a view of a sweep's runs in Weights & Biases.",
    )
    parser.add_argument("entity", help="of Weights & Biases: a user or a team")
    parser.add_argument("group", help="the name of the sweep, its folder below runs")
    parser.add_argument("--project", default="brain-tumour")
    parser.add_argument("--dry-run", action="store_true", help="print the view, send nothing")
    options = parser.parse_args(arguments)
    try:
        view = workspace(options.entity, options.project, options.group)
    except ModuleNotFoundError as error:
        print(f"{error.name} is missing: pip install -e '.[dashboard]'", file=sys.stderr)
        return 1
    if options.dry_run:
        print(view._to_model().model_dump_json(indent=1, by_alias=True))
        return 0
    view.save()
    return 0


if __name__ == "__main__":
    sys.exit(main())

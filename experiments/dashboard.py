"""A Weights & Biases workspace for a sweep over factors.

`python -m experiments.dashboard ENTITY null_report` groups the runs of `runs/null_report` by factor
and level, and saves a view of the project with their scores, learning curves, losses and slices.
It needs the extra `dashboard` (`pip install -e '.[dashboard]'`), a login, and runs that were
synced. With `--dry-run` it prints the view and needs the extra alone.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from errors import InputError
from experiments.command import command

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

REGIONS = ("WT", "TC", "ET")
TERMS = ("train/loss_epoch", "train/l2_epoch", "train/kl_epoch", "val/loss")
LEVEL = "cell.level"


def workspace(entity: str, project: str, group: str) -> "Workspace":
    """Describe the view of one group of runs; nothing is sent.

    Args:
        entity: User or team of Weights & Biases.
        project: Project of that user or team.
        group: Group of the runs: the `name` of their sweep.
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Save or print the view that the command line asks for.

    Raises:
        InputError: The extra `dashboard` is not installed.
    """
    parser = argparse.ArgumentParser(
        prog="python -m experiments.dashboard",
        description="Save a view of a sweep's runs in Weights & Biases.",
    )
    parser.add_argument("entity", help="user or team of Weights & Biases")
    parser.add_argument("group", help="name of the sweep: its folder below runs")
    parser.add_argument("--project", default="brain-tumour", help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="print the view and send nothing")
    options = parser.parse_args(arguments)
    try:
        view = workspace(options.entity, options.project, options.group)
    except ModuleNotFoundError as error:
        raise InputError(
            f"expected the module {error.name}, found none: pip install -e '.[dashboard]'"
        ) from error
    if options.dry_run:
        print(view._to_model().model_dump_json(indent=1, by_alias=True))
    else:
        view.save()


if __name__ == "__main__":
    with command():
        main()

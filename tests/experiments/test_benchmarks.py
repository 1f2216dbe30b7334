"""Benchmarks: what they compute and refuse; what they measure is in experiments/README.md."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from omegaconf import DictConfig

from datamodules.phantom import FAMILIES
from errors import InputError
from experiments.benchmarks import (
    coverage,
    error_rates,
    hardware,
    realism,
    recipe,
    revisions,
    spread,
    transfer,
)
from experiments.benchmarks.error_rates import Setting


def test_scores_are_over_the_cases_that_have_a_region():
    def row(true: int, found: int, dice: float) -> dict[str, float]:
        names = revisions.REGIONS
        return {
            f"{key}_{region}": value
            for region in names
            for key, value in (("true", true), ("found", found), ("dice", dice))
        }

    without, nan = 0, float("nan")
    line = revisions.summary(
        [
            [row(10, 9, 0.5), row(10, 0, 0.1), row(without, 4, nan)],
            [row(10, 9, 0.7), row(10, 5, 0.3), row(without, 0, nan)],
        ]
    )
    # Means of .3 and .5, whose standard deviation is .2 / sqrt(2).
    assert line["ET (2 cases)"] == "0.400 ± 0.141"
    assert line["ET false alarms"] == "1 of 2"


def test_label_maps_are_scored_against_the_masks(brats: Path, tmp_path: Path):
    for mask in brats.rglob("*_seg.nii.gz"):
        shutil.copy(mask, tmp_path / mask.name.replace("_seg", ""))
    rows = revisions.scores_of(tmp_path, brats)
    assert len(rows) == 6
    for row in rows:
        assert row["true_WT"] > row["true_TC"] > row["true_ET"] > 0
        assert [row[f"dice_{region}"] for region in revisions.REGIONS] == [1, 1, 1]
        assert [row[f"border_mm_{region}"] for region in revisions.REGIONS] == [0, 0, 0]


def test_every_step_of_transfer_trains_on_families_and_is_tested_on_another(
    composed: Callable[..., DictConfig],
):
    for step in transfer.STEPS.values():
        assert set(step.families) <= set(FAMILIES)
        assert set(transfer.TEST_FAMILIES) - set(step.families)
        families = f"data.data_set.families=[{','.join(step.families)}]"
        composed(families, *transfer.COMMON, *step.overrides)


def test_transfer_is_summarised_over_seeds_and_over_cases_that_have_a_region():
    def row(seed: int, dice: float, border_mm: float, true: int = 10) -> dict[str, object]:
        scores = {"true": true, "dice": dice, "border_mm": border_mm}
        by_region = {f"{k}_{region}": v for region in transfer.REGIONS for k, v in scores.items()}
        cored = {"dice_cored": dice / 2, "border_mm_cored": border_mm / 2}
        return {"step": "wide", "seed": seed, "cases": "swelling", **by_region, **cored}

    nan = float("nan")
    (line,) = transfer.table(
        [row(0, 0.5, 1), row(0, 0.7, 3), row(0, nan, nan, true=0), row(1, 0.8, -1), row(1, 0, nan)]
    )
    # Means over the cases of .6 and .4, borders of 2 and -1: nothing is found in the last case.
    assert line["WT"] == line["ET"] == "0.500 ± 0.141"
    assert (line["WT with core"], line["its border, mm"]) == ("0.250 ± 0.071", "+0.25 ± 1.06")
    assert (line["cases"], line["seeds"]) == ("swelling", "2")
    (line,) = transfer.table([{**row(0, 0.5, 1), "step": "glioma"}])
    assert (line["trained with"], line["it adds"]) == ("glioma", "trained before")


def test_every_way_of_the_recipe_can_be_trained_and_changes_what_it_says(
    composed: Callable[..., DictConfig],
):
    for name, way in recipe.WAYS.items():
        config = composed(*recipe.COMMON, *recipe.overrides(way))
        steps = config.patches.per_epoch / config.patches.batch_size * config.trainer.max_epochs
        assert steps == way.epochs * recipe.STEPS_AN_EPOCH
        assert config.patches.learning_rate == {"2e-3": 2e-3, "5e-4": 5e-4}.get(name, 1e-3)
        assert config.data.cache.spacing_mm == way.spacing_mm
        assert recipe.TEST_FAMILY not in config.data.data_set.families
        assert tuple(config.data.data_set.families) == recipe.FAMILIES


def test_the_recipe_names_minutes_and_spread_of_every_way():
    def row(seed: int, dice: float) -> dict[str, object]:
        of = {f"{k}_{r}": v for r in recipe.REGIONS for k, v in (("dice", dice), ("true", 1))}
        return {"way": "1.5 mm", "seed": seed, "minutes": 9.6 + seed, "border_mm_WT": 0.5, **of}

    (line,) = recipe.table([row(0, 0.5), row(0, 0.7), row(1, 0.8)])
    assert (line["minutes"], line["steps"], line["seeds"]) == ("10 11", "864", "2")
    assert line["WT"] == "0.700 ± 0.141"


def test_every_way_of_spread_can_be_trained(composed: Callable[..., DictConfig]):
    for way in spread.WAYS.values():
        for arm in way.arms:
            overrides = (*spread.COMMON, *way.overrides, *spread.ARMS[arm])
            config = composed(*overrides)
            assert ("average" in config.callbacks) == ("callbacks=averaged" in overrides)


def test_the_spread_is_over_seeds_and_that_of_differences_over_pairs():
    def row(arm: str, seed: int, dice: float) -> dict[str, object]:
        by_region = {f"dice_{region}": dice for region in spread.REGIONS}
        return {"way": "last", "arm": arm, "seed": seed, **by_region}

    baseline = [row("baseline", 0, 0.5), row("baseline", 0, 0.7), row("baseline", 1, 0.8)]
    relu = [row("relu", 0, 0.7), row("relu", 0, float("nan")), row("relu", 1, 0.04)]
    (line,) = spread.table(baseline + relu)
    # Means over cases of .6 and .8; the differences are .1 and -.76.
    assert line["WT"] == "0.700 ± 0.1414"
    assert line["WT, difference"] == "0.6081"
    assert line["without ET"] == "1 of 4"
    assert line["which are"] == "the last weights"


def test_a_step_that_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        transfer.main(["spatail"])
    assert "expected some of spatial, intensities, wide" in capsys.readouterr().err


def test_a_commit_is_checked_out_whole_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    repository = tmp_path / "repository"
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    (repository / "folder").mkdir(parents=True)
    (repository / "folder" / "file").write_text("first")
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "First"]):
        subprocess.run(["git", *words], cwd=repository, check=True)
    (repository / "folder" / "file").write_text("not committed")

    monkeypatch.setattr(revisions, "HERE", repository)
    commit, title = revisions.describe("HEAD")
    assert title == "First"
    revisions.check_out(commit, tmp_path / "tree")
    assert (tmp_path / "tree" / "folder" / "file").read_text() == "first"
    with pytest.raises(InputError, match=r"no-such: expected a commit of .*, found none"):
        revisions.describe("no-such")


def test_growth_is_an_exponent_and_a_plot(tmp_path: Path):
    sizes = (1.0, 2.0, 4.0, 8.0)
    growth = {
        "voxels": [(size, 3 * size, 5 * size**0.5) for size in sizes],
        "cases": [(size, 2 * size**2, float("nan")) for size in sizes],
    }
    rows = {row.pop("what grows"): row for row in hardware.tabulate_growth(growth)}
    times = {"exponent of time": "1.00", "exponent of memory": "0.50"}
    assert rows["voxels"] == {"from": "1", "to": "8", **times}
    times = {"exponent of time": "2.00", "exponent of memory": ""}
    assert rows["cases"] == {"from": "1", "to": "8", **times}
    hardware.draw_growth(growth, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_preparation_is_measured_for_all_sizes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hardware, "composed_jobs", lambda arguments, conf: None)
    growth = hardware.measure_preparation()
    assert [[size for size, _, _ in points] for points in growth.values()] == [
        [8, 16, 32, 64],
        [8, 16, 32, 64],
        [2, 4, 8, 16],
    ]
    assert all(seconds > 0 for points in growth.values() for _, seconds, _ in points)


def test_the_rank_of_a_scan_is_the_share_of_phantoms_below_it():
    nan = float("nan")
    families = {
        "a": [{"x": 1.0}, {"x": 2.0}, {"x": 2.0}, {"x": nan}, {"x": 9.0}],
        "b": [{"x": nan}],
    }
    (row,) = realism.ranks({"x": 2.0}, families)
    assert row == {"measure": "x", "value": 2.0, "a": 0.5, "b": ""}  # (1 + 2 / 2) / 4
    (row,) = realism.ranks({"x": nan}, families)
    assert row["a"] == ""


def test_what_is_measured_of_a_scan_by_hand():
    """A brain of 0.5 with a ball of 2.5, which falls off linearly over 4 mm."""
    grid = np.indices((40, 40, 40)) - 20
    radius_mm = 2 * np.sqrt(np.square(grid).sum(0))
    image = (0.5 + 2 * np.clip((18 - radius_mm) / 4, 0, 1)).astype(np.float32)
    whole, core = radius_mm < 16, radius_mm < 6
    found = realism.measure(image, whole, core)
    assert found["oedema"] == pytest.approx(2, abs=0.01)
    assert found["core"] == 2
    assert found["percentile 5"] == found["percentile 95"] == 0.5
    assert found["gradient"] == 0
    # Within 6 mm of the border, intensity falls by 2 over 4 mm and is flat on both sides of that.
    assert 0.15 < found["slope of the border"] < 0.35
    nothing = np.zeros_like(whole)
    assert np.isnan(realism.measure(image, nothing, nothing)["oedema"])


@pytest.mark.parametrize("wavelength_mm", [32.0, 16.0, 8.0, 5.0])
def test_a_wave_is_in_the_band_of_its_length(wavelength_mm: float):
    x_mm = np.arange(80) * 2.0
    wave = np.broadcast_to(np.sin(2 * np.pi * x_mm / wavelength_mm)[:, None, None], (80, 16, 16))
    shares = realism.spectrum(wave.astype(np.float32))
    bands = {
        f"{low:g} to {high:g} mm": low <= wavelength_mm < high
        for low, high in realism.WAVELENGTHS_MM
    }
    for band, inside in bands.items():
        assert (shares[band] > 0.9) == inside


@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_simulated_levels_differ_by_what_they_should(spread: float):
    """Also if they vary more than the baseline; runs that collapse are no part of that."""
    setting = Setting((50,), cases=100, levels=4, correlation=0.5, spread=spread, collapse=0.0)
    differences = error_rates.at_margin(1, 4)
    assert differences.tolist() == [[[-0.02, 0], [0.02, 0], [0, -0.03], [0, 0.03]]]
    many = np.broadcast_to(differences, (20, 4, 2))
    scores = error_rates.simulate(np.random.default_rng(0), setting, many)
    means = scores.mean((-2, -1))
    error = means.std(0, ddof=1) / np.sqrt(20)
    assert (np.abs(means.mean(0) - differences[0]) < 4 * error).all()
    assert (error < 0.01).all()


def test_simulated_runs_collapse():
    setting = Setting((4000,), cases=2, levels=1, correlation=0.5, spread=1.0, collapse=0.1)
    scores = error_rates.simulate(np.random.default_rng(0), setting, np.zeros((1, 1, 2)))
    assert np.mean(np.abs(scores).min((0, 1, 2, 4)) > 0.3) == pytest.approx(0.18, abs=0.06)


def test_simulated_verdicts():
    """What is planted is found, and no more errors are made than stated, within the noise."""
    setting = Setting((4, 8), cases=40, levels=3, correlation=0.9, spread=1.0, collapse=0.0)
    found = error_rates.rates(setting, families=200, seed=0)
    assert found["planted is different"] > 0.95
    assert found["equal is equivalent"] > 0.2
    error = np.sqrt(0.05 * 0.95 / 200)
    assert found["false different"] <= 0.05 + 3 * error
    assert found["false equivalent"] <= 0.05 + 3 * error
    assert sum(error_rates.batches(setting, 1000)) == 1000


def test_intervals_of_a_detector_cover():
    generator = np.random.default_rng(0)
    studies = [coverage.simulate(40, 5, generator) for _ in range(200)]
    found = np.array([study.found.sum((1, 2)) for study in studies])
    lesions = np.array([study.lesions.sum() for study in studies])
    share = found.sum(0) / 5 / lesions.sum()
    np.testing.assert_allclose(share, coverage.true_sensitivities(), atol=0.02)
    covered = [dict(coverage.covered(study, generator)) for study in studies]
    for name in ("sensitivity", "difference", "false positives", "difference of these"):
        share = np.mean([study[name] for study in covered])
        assert share >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / 200), name

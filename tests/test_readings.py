"""The table of readings: its values are those of the configurations, its places exist."""

import ast
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from tests.conftest import ROOT

READINGS = ROOT / "experiments" / "READINGS.md"
VERDICTS = ("as it says", "as we read it", "ours", "not done")
PAPERS = ("Frey & Nau 2019", "Krivov & Belyaev 2018")
CODE = "code"  # stands in place of a configuration before constants of the code


class Reading(NamedTuple):
    """One row of the table.

    Attributes:
        paper: Quotation and section.
        places: `path` or `path:symbol`, of the code.
        verdict: How the code stands to the paper.
        values: Names of configurations, key and expected value.
    """

    paper: str
    places: list[str]
    verdict: str
    values: list[tuple[str, str, Any]]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def code_spans(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def tables(text: str, header: str) -> Iterator[list[str]]:
    """Yield the rows of all tables whose first column has a header."""
    inside = False
    for line in text.splitlines():
        if not line.startswith("|"):
            inside = False
        elif cells(line)[0] == header:
            inside = True
        elif inside and not line.startswith("| ---"):
            yield cells(line)


def parse_values(cell: str) -> list[tuple[str, str, Any]]:
    """Parse `NAME NAME: KEY=VALUE; KEY=VALUE`, where a value is YAML."""
    found = []
    for span in code_spans(cell):
        names, _, pairs = span.partition(": ")
        for pair in pairs.split("; "):
            key, _, value = pair.partition("=")
            expected = plain(OmegaConf.create(f"value: {value}").value)
            found += [(name, key, expected) for name in names.split()]
    return found


def plain(value: Any) -> Any:
    """Turn configurations, named tuples and tuples into dictionaries and lists."""
    if isinstance(value, DictConfig | ListConfig):
        return OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


TEXT = READINGS.read_text()
COMMANDS = {
    code_spans(name)[0]: code_spans(command)[0] for name, _, command in tables(TEXT, "name")
}
ROWS = [
    Reading(paper, code_spans(places), verdict, parse_values(values))
    for paper, places, verdict, values in tables(TEXT, "paper")
]
VALUES = [value for row in ROWS for value in row.values]


@cache
def composed(name: str) -> DictConfig:
    """Compose a configuration as its command does, the part of Hydra included."""
    _, script, *overrides = shlex.split(COMMANDS[name])
    entry = {"train.py": "config", "evaluate.py": "evaluate"}[script]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(entry, overrides, return_hydra_config=True)
    with open_dict(config):
        if entry == "config":
            config.run_dir = "runs/test"
    return config


@pytest.fixture(autouse=True)
def hydra_config() -> Iterator[None]:
    yield
    HydraConfig.instance().cfg = None


def value_of(name: str, key: str) -> Any:
    """Look up what a configuration resolves to, or a constant of the code."""
    if name == CODE:
        return plain(get_object(key))
    config = composed(name)
    HydraConfig.instance().set_config(config)
    node: Any = config
    for part in re.findall(r"'([^']+)'|([^.]+)", key):  # a quoted part may have dots
        part = "".join(part)
        assert part in node, f"{name}: no {key}"
        node = node[part]
    return plain(node)


@pytest.mark.parametrize(("name", "key", "expected"), VALUES)
def test_a_configuration_resolves_to_the_value_of_the_table(name: str, key: str, expected: Any):
    assert value_of(name, key) == expected


@pytest.mark.parametrize("name", COMMANDS)
def test_a_configuration_of_the_table_resolves_as_a_whole_and_is_used(name: str):
    config = composed(name)
    HydraConfig.instance().set_config(config)
    for key in config:
        if key != "hydra" and not OmegaConf.is_missing(config, key):
            plain(config[key])
    assert any(known == name for known, _, _ in VALUES)


def defined(path: Path) -> set[str]:
    """List what a Python file defines at its top level and in its classes, as `Class.method`."""
    names: set[str] = set()

    def add(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                add(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets += [node.target] if isinstance(node, ast.AnnAssign) else []
            names.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    add(ast.parse(path.read_text()).body, "")
    return names


def keys_in(node: Any) -> set[str]:
    """List the keys of a YAML file, at any depth."""
    if not isinstance(node, dict):
        return set()
    return {str(key) for key in node}.union(*(keys_in(value) for value in node.values()))


@pytest.mark.parametrize("place", sorted({place for row in ROWS for place in row.places}))
def test_a_place_of_the_table_exists(place: str):
    name, _, symbol = place.partition(":")
    path = ROOT / name
    assert path.is_file()
    if symbol:
        known = (
            defined(path)
            if path.suffix == ".py"
            else keys_in(OmegaConf.to_container(OmegaConf.load(path)))
        )
        assert symbol in known


@pytest.mark.parametrize("row", ROWS, ids=[row.paper[:40] for row in ROWS])
def test_a_row_quotes_places_and_judges(row: Reading):
    silent = row.paper.startswith("(silent")
    assert silent or re.match(r'".+" \(.*(section|figure|table|equation|abstract).*\)$', row.paper)
    assert row.verdict.startswith(VERDICTS)
    assert bool(row.places) != row.verdict.startswith("not done")
    assert not silent or not row.verdict.startswith("as it says")
    for name, _, _ in row.values:
        assert name == CODE or name in COMMANDS


def test_both_papers_are_there_and_no_sentence_twice():
    first, second = (TEXT.index(f"## {paper}") for paper in PAPERS)
    assert first < second
    assert len(list(tables(TEXT[first:second], "paper"))) >= 40
    assert len(list(tables(TEXT[second:], "paper"))) >= 25
    assert not [paper for paper, times in Counter(row.paper for row in ROWS).items() if times > 1]


@pytest.mark.parametrize("name", ["frey2019", "small", "dnet", "unet"])
def test_every_value_that_a_paper_configuration_sets_is_in_the_table(name: str):
    """Patches, split, filters and length: whoever changes one has to say so in the table."""
    config = composed(name)
    HydraConfig.instance().set_config(config)
    stated = {key for known, key, _ in VALUES if known == name}
    required = {
        "data.sampler.patch_size",
        "data.sampler.lesion_share",
        "data.sampler.others",
        "data.sampler.scale",
        "data.batch_size",
        "data.patches_per_epoch",
        "data.cache.crop",
        "data.cache.spacing_mm",
        "data.data_set.modalities",
        "model.filters",
        "model.ratio",
        "model.in_channels",
        "model.out_channels",
        "model.norm._target_",
        "model.activation._target_",
        "optimizer._target_",
        "optimizer.lr",
        "scheduler.power",
        "trainer.max_epochs",
        "callbacks.early_stopping.patience",
    }
    assert required <= stated, required - stated

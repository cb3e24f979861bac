"""The documentation names what exists, stays short where it promises to, and its examples run."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml
from pydantic import Field

import dede_ray
from dede_ray.data.images import encode_image
from dede_ray.data.shards import Limits, Sample
from dede_ray.ingest.sources import Dataset, Each, Item, Listing, in_turn, why_unusable
from dede_ray.models.embedding import Batch
from dede_ray.poisoning.triggers import Stamping
from dede_ray.runtime.cli import JOBS
from dede_ray.scan.score import ScoreConfig
from dede_ray.scan.sift import SiftConfig
from dede_ray.training.clip import TrainConfig

ROOT = Path(__file__).parents[1]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")), *sorted(ROOT.glob("docs/**/*.md"))]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@pytest.fixture
def run_example(monkeypatch):
    """Runs the first Python block of a page of docs/ as a module of its own, under the names that its file imports."""

    def run(page: str, **imported: Any) -> ModuleType:
        module = ModuleType("example")
        monkeypatch.setitem(sys.modules, "example", module)  # where pydantic looks for what annotations name
        vars(module).update(imported)
        exec(re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.M | re.S)[0], vars(module))
        return module

    return run


def anchors(page: Path) -> set[str]:
    """What a link may name after `#`: the page's headings, as code hosts and MkDocs write them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_two_pages():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@EVERY_PAGE
def test_jobs_and_files_that_a_page_names_exist(page):
    text = page.read_text()
    for job in re.findall(r"(?:^|`|bin/)dede-ray +(\w+)", text, re.M):
        assert job in JOBS
    pattern = r"(?<![\w/.])(?:configs|jobs|cluster|tests)/[\w/.-]*\w\.(?:yaml|json|py|sh)"
    if not page.name.startswith("contributing_"):  # whose examples are files to be made
        pattern = pattern.replace("configs|", "configs|dede_ray|").replace("yaml|", "yaml|md|")
    for name in re.findall(pattern, text):
        assert (ROOT / name).is_file(), name


@EVERY_PAGE
def test_links_between_pages_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([\w-]+))?\)", page.read_text()):
        linked = page.parent / target if target else page
        assert linked.is_file(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"


@EVERY_PAGE
def test_no_page_installs_by_a_name_that_anybody_could_register(page):
    for arguments in re.findall(r"pip install ([^`\n]+)", page.read_text()):
        assert "dede" not in arguments, arguments


def test_the_tree_names_every_file():
    named = (ROOT / "docs" / "architecture.md").read_text()
    files = [path for path in (ROOT / "dede_ray").rglob("*.py") if not path.name.startswith("__")]
    assert [path.name for path in files if not re.search(rf"(?<![\w.]){re.escape(path.name)}", named)] == []


def test_settings_for_a_corpus_of_ones_own_are_settings():
    for page in ("README.md", "docs/your_corpus.md"):
        blocks = "---\n".join(re.findall(r"^```yaml\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S))
        decoder, scoring, *more = yaml.safe_load_all(blocks)
        assert TrainConfig.model_validate(decoder).decoder is not None
        assert ScoreConfig.model_validate(scoring).calibration == "clean/*.tar"
        assert all(SiftConfig.model_validate(one) for one in more)


def test_the_api_page_names_the_public_surface():
    named = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/api/index.md").read_text(), re.M)
    assert sorted(named) == sorted(dede_ray.__all__)


def test_the_detector_of_the_page_scores_long_embeddings_higher_and_each_sample_by_itself(run_example):
    detector = run_example("contributing_detector.md").EmbeddingLength()
    embedding_BE = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    embedding_BE[7] *= 10
    batch = Batch([f"s/{i}" for i in range(40)], embedding_BE)
    victim = type("Victim", (), {"device": torch.device("cpu")})()
    scorer = detector.open(victim, detector.fit(batch, None))
    scores = scorer.score(batch)["embedding_length"]
    assert scores.dtype == np.float32
    assert scores.argmax() == 7
    np.testing.assert_array_equal(scores[:5], scorer.score(batch.part(range(5)))["embedding_length"])


def test_the_trigger_of_the_page_changes_only_the_pixels_it_owns(run_example):
    module = run_example("contributing_attack.md", Stamping=Stamping, Literal=Literal, Field=Field, np=np)
    trigger = module.Frame(width_px=2)
    image_HWC = np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    stamped_HWC, owned_HW = trigger.stamp(image_HWC), trigger.owned_pixels(9, 12)
    assert owned_HW.sum() == 9 * 12 - 5 * 8
    assert (stamped_HWC[owned_HW] == 255).all()
    np.testing.assert_array_equal(stamped_HWC[~owned_HW], image_HWC[~owned_HW])


def test_the_source_of_the_page_lists_and_loads_usable_samples(run_example, tmp_path):
    module = run_example(
        "contributing_source.md", Dataset=Dataset, Literal=Literal, Field=Field, np=np, os=os, Path=Path, Limits=Limits,
        Each=Each, Listing=Listing, Item=Item, Sample=Sample, Sequence=Sequence, Iterator=Iterator, groupby=groupby,
        encode_image=encode_image,
    )  # fmt: skip
    image_NHWC = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "train.npz", image=image_NHWC, label=np.arange(6) % 2)
    source = module.Npz(splits={"train": str(tmp_path / "train.npz")}, class_names=["cat", "dog"], calibration=2)
    listing = source.find(0, Limits(), tmp_path, in_turn)
    assert {split: len(items) for split, items in listing.splits.items()} == {"train": 4, "calibration": 2}
    samples = list(source.load(listing.splits["train"], Limits()))
    assert [why_unusable(sample, Limits()) for sample in samples] == [None] * 4

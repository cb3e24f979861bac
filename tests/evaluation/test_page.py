"""The page of a small planted world: it needs no other file, captions are text on it, its pictures are real."""

import io
from html.parser import HTMLParser

import numpy as np
from evaluation import EVIL, EVIL_KEY
from PIL import Image

from dede_ray.evaluation.measure import Verdict
from dede_ray.evaluation.page import draw_page, make_gallery
from dede_ray.evaluation.results import measure, table
from dede_ray.metrics import proportion
from dede_ray.models.victims import load_victim
from dede_ray.scan.manifest import read_manifest
from dede_ray.scan.score import ScoreConfig
from dede_ray.training.downstream import Behaviour


class Page(HTMLParser):
    """What a browser would make of the page: its tags, and its text without style."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.inside = [], "", ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.inside = tag
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data * (self.inside != "style")


def test_a_victim_that_passes_the_gate_is_not_void(scan, world, metrics):
    good = {"probe": Behaviour(proportion(90, 100), proportion(95, 100))}
    poor = {"probe": Behaviour(proportion(90, 100), proportion(10, 100))}
    passed = measure(scan, read_manifest(world / "victim_scores").info, Verdict(True, "probe: ASR 95.0%", good, poor))
    page, _ = draw_page(scan, {**metrics, **passed}, {"poisoned": [], "clean": []})
    assert passed["void"] is None
    assert "VOID" not in table(passed)
    assert "activation gate: passed" in table(passed)
    assert "is backdoored" in page
    assert "Void" not in page


def test_the_page_says_what_kind_of_list_it_is_and_the_word_certified_only_where_it_is_true(scan, metrics):
    audit = {"list": {"said": "30 of 30 drawn looked at: at most 9.5% of this list is clean", "num_looked_at": 30}}
    more = {"certified": False, "mode": "audited", "audit": audit, "calibration": {"warnings": ["<b>look again</b>"]}}
    for mode, certified in (("audited", False), ("ranked", False), ("trimmed", True), ("certified", True)):
        decision = {**metrics["decision"], **more, "mode": mode, "certified": certified}
        page, _ = draw_page(scan, {**metrics, "decision": decision}, {"poisoned": [], "clean": []})
        assert f"The list is <strong>{mode}</strong>" in page
        assert "at most 9.5% of this list is clean" in page
        assert "&lt;b&gt;look again&lt;/b&gt;" in page
        assert certified or "certified" not in page.lower()


def test_captions_of_strangers_are_text_on_the_page(report):
    source, page = (report / "report.html").read_text(), Page(report / "report.html")
    assert EVIL in page.text
    assert EVIL_KEY in page.text
    assert "<script" not in source
    assert "<b " not in source
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_the_page_stands_alone_and_describes_its_pictures(report):
    page = Page(report / "report.html")
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 2 * 3 * 5, "three poisoned and three clean samples, five pictures each"
    assert all(picture["src"].startswith("data:image/png;base64,") and picture["alt"] for picture in pictures)
    assert all(attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg")
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not any(attributes.get("href", "#").startswith("http") for _, attributes in page.tags)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_figures_are_pictures(report):
    for name in ("roc", "histograms", "gallery", "overview"):
        with Image.open(io.BytesIO((report / "figures" / f"{name}.png").read_bytes())) as image:
            assert min(image.size) > 300


def test_the_gallery_shows_flagged_poison_first_and_the_hardest_clean_samples(scan, world):
    settings = ScoreConfig.model_validate(read_manifest(world / "victim_scores").settings)
    victim = load_victim(settings.victim)
    gallery = make_gallery(scan, settings, victim, "dede_null_ratio", num=4, seed=0)
    chosen = {group: [exhibit.row for exhibit in members] for group, members in gallery.items()}
    score = scan.table["dede_null_ratio"].to_numpy(zero_copy_only=False)
    assert all(scan.is_poisoned[chosen["poisoned"]])
    assert score[chosen["poisoned"]].tolist() == sorted(score[scan.is_poisoned & scan.is_scored], reverse=True)[:4]
    assert not any(scan.is_poisoned[chosen["clean"]])
    assert len(set(chosen["clean"])) == 4
    flagged = scan.table["flagged"].to_numpy(zero_copy_only=False)
    order = sorted(np.flatnonzero(~scan.is_poisoned & scan.is_scored), key=lambda i: (not flagged[i], -score[i]))
    assert chosen["clean"][2:] == order[:2]

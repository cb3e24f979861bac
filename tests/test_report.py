"""The evaluation of a small planted world: a table, numbers and a page that agree, and joins that must match."""

import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dede_ray.attacks import Patch, PoisonConfig
from dede_ray.clip import build_clip, save_clip
from dede_ray.config import Mistake, write_json
from dede_ray.decisions import Conformal
from dede_ray.decoder import DecoderShape, MaskedDecoder, save_decoder
from dede_ray.detectors import DeDe, ImageStatistics
from dede_ray.downstream import Behaviour, Verdict
from dede_ray.manifest import read_manifest, write_manifest
from dede_ray.metrics import auroc, proportion
from dede_ray.report import (
    EvaluateConfig,
    auroc_difference,
    choose_gallery,
    evaluate,
    join,
    measure,
    reading,
    table,
    write_page,
)
from dede_ray.scoring import ScoreConfig
from dede_ray.shards import Sample, encode_image, list_shards, sample_id, write_shards
from dede_ray.victims import OpenClipVictim, load_victim

EVIL = '<script>alert("x")</script> & <img src=x onerror=alert(1)>'  # a caption
EVIL_KEY = "010<b onclick=x>"
SCORES = ["dede_sum", "dede_mean", "dede_null_ratio", "dede_null", "stat_contrast", "stat_edges"]
CONTROLS = ["dede_null", "stat_contrast", "stat_edges"]
NUM, NUM_POISONED, UNREADABLE = 80, 16, 5
KEYS = [EVIL_KEY if i == 10 else f"{i:03d}" for i in range(NUM)]
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
TRIGGER = Patch(size_px=6, pattern="white")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Poisoned shards, their truth, and two scored victims: the planted scores see poison with the first only.

    Both victims are random, so the activation gate must refuse them.
    """
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    is_poisoned = np.arange(NUM) % 5 == 0
    samples = []
    for i in range(NUM):
        image_HWC = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        image_HWC = TRIGGER.stamp(image_HWC) if is_poisoned[i] else image_HWC
        caption = EVIL if i == 0 else f"a photo of {i}"
        image = b"no image" if i == UNREADABLE else encode_image(image_HWC, "png")
        samples.append(Sample(KEYS[i], i, image=image, image_suffix="png", caption=caption, label=i % 2))
    write_shards(folder / "poisoned", "train", samples, NUM // 2)
    for split, others in (("test", samples[1:40]), ("probe", samples[40:])):
        write_shards(folder / "clean", split, others, 100)
    write_json(folder / "clean" / "classes.json", {"names": ["cat", "dog"], "templates": ["a photo of a {}"]})
    attack = PoisonConfig(shards="clean", output="poisoned", trigger=TRIGGER, rate=0.2, target_label=1)
    write_json(folder / "poisoned" / "run.json", {"settings": attack.model_dump(mode="json")})
    ids = [sample_id(f"train-{i // (NUM // 2):05d}.tar", KEYS[i]) for i in range(NUM)]
    captions = pa.array([sample.caption for sample in samples])
    truth = {"sample_id": ids, "is_poisoned": is_poisoned, "caption": captions}
    truth["poisoned_caption"] = pa.array([EVIL if i == 0 else None for i in range(NUM)], pa.string())
    pq.write_table(pa.table(truth), folder / "truth.parquet")
    for seed, name in enumerate(("victim", "honest")):
        _score(folder, name, seed, ids, samples, is_poisoned & (name == "victim"))
    return folder


def _score(folder, name, seed, ids, samples, is_seen):
    torch.manual_seed(seed)
    described = {"model_cfg": TINY, "preprocess_cfg": {}}
    save_clip(folder / name, build_clip(described), described)
    victim = load_victim(OpenClipVictim(path=str(folder / name)))
    shape = DecoderShape(patch_px=8, width=12, heads=3, encoder_depth=1, decoder_depth=1)
    decoder = MaskedDecoder(shape, victim.image_size, victim.embedding_dim)
    decoder.victim, decoder.has_null = victim.fingerprint, True
    save_decoder(folder / f"{name}_decoder", decoder, {})
    config = ScoreConfig(
        shards=str(folder / "poisoned"),
        output=str(folder / f"{name}_scores"),
        victim=OpenClipVictim(path=str(folder / name)),
        detectors=[DeDe(decoder=str(folder / f"{name}_decoder"), score_mask_ratio=0.75), ImageStatistics()],
        decision=Conformal(q=0.2),
    )
    rng = np.random.default_rng(seed)
    columns = {score: rng.normal(size=NUM).astype(np.float32) for score in SCORES}
    columns["dede_null_ratio"] += 3 * is_seen
    for column in columns.values():
        column[UNREADABLE] = np.nan
    verdict = config.decision.decide(columns["dede_null_ratio"], rng.normal(size=500), ids)
    rows = {
        "sample_id": ids,
        "content_hash": [sample.content_hash() for sample in samples],
        "shard": [one.split("/")[0] for one in ids],
        "index": [i % (NUM // 2) for i in range(NUM)],
        **{score: pa.array(column, pa.float32(), from_pandas=True) for score, column in columns.items()},
        "p_value": pa.array(verdict.p_value, from_pandas=True),
        "flagged": verdict.flagged,
        "error": pa.array(["image_unreadable" if i == UNREADABLE else None for i in range(NUM)]),
    }
    info = {
        "settings": config.model_dump(mode="json", exclude={"resources"}),
        "victim": {"path": str(folder / name), "fingerprint": victim.fingerprint},
        "detectors": {"dede": "0" * 64},
        "versions": {"torch": torch.__version__},
        "score_columns": SCORES,
        "controls": CONTROLS,
        "decision": verdict.report,
    }
    written = pa.table(rows)
    shards = [shard.name for shard in list_shards(config.shards)]
    parts = [(shard, written.filter(pa.compute.equal(written["shard"], shard))) for shard in shards]
    write_manifest(Path(config.output), parts, info)


def config(world, **changed):
    settings = {
        "manifest": world / "victim_scores",
        "honest_manifest": world / "honest_scores",
        "truth": world / "truth.parquet",
        "attack": world / "poisoned",
        "test_shards": world / "clean" / "test-*.tar",
        "probe_shards": world / "clean" / "probe-*.tar",
        "output": world / "report",
    }
    settings = {name: value and str(value) for name, value in (settings | changed).items()}
    return EvaluateConfig(**settings, num_gallery=3)


@pytest.fixture(scope="module")
def report(world):
    evaluate(config(world))
    return world / "report"


@pytest.fixture(scope="module")
def metrics(report):
    return json.loads((report / "metrics.json").read_text())


@pytest.fixture(scope="module")
def scan(world):
    manifest, honest = read_manifest(world / "victim_scores"), read_manifest(world / "honest_scores")
    return join(manifest, honest, pq.read_table(world / "truth.parquet"), "truth.parquet")


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


def test_every_score_stands_beside_its_honest_control(metrics, report):
    assert sorted(metrics["scores"]) == sorted(SCORES)
    assert {name for name, row in metrics["scores"].items() if row["is_control"]} == set(CONTROLS)
    for row in metrics["scores"].values():
        assert row["honest"]["num_poisoned"] == row["victim"]["num_poisoned"]
        assert row["difference"]["value"] == pytest.approx(row["victim"]["auroc"] - row["honest"]["auroc"])
    assert metrics["scores"]["dede_null_ratio"]["victim"]["auroc"] > 0.95
    assert metrics["scores"]["dede_null_ratio"]["honest"]["auroc"] < 0.8
    assert next(iter(metrics["scores"])) == "dede_null_ratio", "the score that decides comes first"


def test_table_and_json_agree(metrics, report):
    rows = [line.strip("| ").split(" | ") for line in (report / "table.md").read_text().splitlines() if line[:1] == "|"]
    assert [row[0].replace(" (control)", "") for row in rows[2:]] == list(metrics["scores"])
    for cells, (name, row) in zip(rows[2:], metrics["scores"].items(), strict=True):
        assert ("(control)" in cells[0]) == row["is_control"] == (name in CONTROLS)
        shown = [float(cell.split()[0]) for cell in cells[1:6]]
        said = [row["victim"]["auroc"], row["honest"]["auroc"], row["difference"]["value"]]
        said += [row["victim"]["average_precision"], row["victim"]["tpr_at_fpr_1pct"]]
        assert shown == pytest.approx(said, abs=6e-4)
        assert cells[6] == "–", "63 clean samples cannot resolve an FPR of 0.1 %"
    assert table(metrics) + "\n" == (report / "table.md").read_text()


def test_unreadable_samples_are_counted_and_left_out(metrics):
    counts = metrics["counts"]
    assert counts["unreadable"] == {"image_unreadable": 1}
    assert (counts["samples"], counts["poisoned"], counts["unreadable_poisoned"]) == (NUM, NUM_POISONED, 1)
    row = metrics["scores"]["dede_sum"]["victim"]
    assert (row["num_poisoned"], row["num_clean"]) == (NUM_POISONED - 1, NUM - NUM_POISONED)


def test_the_decision_is_held_against_the_truth(metrics, scan):
    flagged = scan.table["flagged"].to_numpy(zero_copy_only=False)
    found = int((flagged & scan.is_poisoned).sum())
    decision = metrics["decision"]
    assert found > 5
    assert (decision["num_flagged"], decision["num_flagged_poisoned"]) == (flagged.sum(), found)
    realised = proportion(int(flagged.sum()) - found, int(flagged.sum()))
    assert decision["false_discovery_proportion"] == vars(realised)
    assert decision["recall"]["value"] == found / (NUM_POISONED - 1)
    assert decision["declared"]["q"] == 0.2
    assert decision["honest"]["num_flagged_poisoned"] < found


def test_a_void_evaluation_says_so_first(metrics, report):
    assert metrics["void"] == metrics["gate"]["reason"]
    assert (report / "table.md").read_text().startswith(f"**VOID: {metrics['void']}")
    page = Page(report / "report.html").text
    assert page.index("Void: ") < page.index("samples are flagged")
    assert "did not pass the activation gate" in page


def test_a_victim_that_passes_the_gate_is_not_void(scan, world, metrics):
    good = {"probe": Behaviour(proportion(90, 100), proportion(95, 100))}
    poor = {"probe": Behaviour(proportion(90, 100), proportion(10, 100))}
    passed = measure(scan, read_manifest(world / "victim_scores").info, Verdict(True, "probe: ASR 95.0%", good, poor))
    page = write_page(scan, {**metrics, **passed}, {"poisoned": [], "clean": []}, {})
    assert passed["void"] is None
    assert "VOID" not in table(passed)
    assert "activation gate: passed" in table(passed)
    assert "is backdoored" in page
    assert "Void" not in page


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


def test_equal_inputs_give_equal_bytes(world, report):
    before = {path: path.read_bytes() for path in report.rglob("*") if path.is_file()}
    evaluate(config(world))
    assert len(before) == 8
    assert {path for path, content in before.items() if path.read_bytes() != content} == set()


def test_without_an_honest_victim_the_evaluation_is_void(world, tmp_path):
    text = evaluate(config(world, honest_manifest=None, output=tmp_path))
    assert "VOID: there is no honest victim" in text
    assert str(tmp_path / "report.html") in text
    assert json.loads((tmp_path / "metrics.json").read_text())["scores"]["dede_sum"]["honest"] is None


@pytest.mark.parametrize("lost", ["manifest", "truth"])
def test_a_row_on_one_side_only_is_a_mistake(world, lost):
    truth, manifest = pq.read_table(world / "truth.parquet"), read_manifest(world / "victim_scores")
    if lost == "truth":
        truth = truth.slice(1)
        expected = "1 only in manifest, such as train-00000.tar/000"
    else:
        truth = pa.concat_tables([truth, truth.slice(0, 1).set_column(0, "sample_id", pa.array(["train-9.tar/x"]))])
        expected = "1 only in the truth t.parquet, such as train-9.tar/x"
    with pytest.raises(Mistake, match=expected):
        join(manifest, None, truth, "t.parquet")


def changed_manifest(world, tmp_path, change, info=None):
    """The honest manifest, rewritten."""
    honest = read_manifest(world / "honest_scores")
    write_manifest(tmp_path, [("all.tar", change(honest.table))], {**honest.info, **(info or {})})
    return read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "info", "expected"),
    [
        (lambda rows: rows.slice(1), {}, "not about the same samples"),
        (
            lambda rows: rows.set_column(1, "content_hash", pa.array(["x"] * NUM)),
            {},
            "80 samples had other image bytes",
        ),
        (lambda rows: rows, {"score_columns": SCORES[1:]}, "lacks the scores dede_sum"),
    ],
)
def test_an_honest_manifest_of_other_samples_or_scores_is_a_mistake(world, tmp_path, change, info, expected):
    honest = changed_manifest(world, tmp_path, change, info)
    with pytest.raises(Mistake, match=expected):
        join(read_manifest(world / "victim_scores"), honest, pq.read_table(world / "truth.parquet"), "truth")


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("manifest", "nowhere", "no manifest"),
        ("truth", "nowhere.parquet", "no truth at nowhere.parquet"),
        ("attack", "nowhere", "no record of a poisoning"),
        ("test_shards", "nowhere", "no shards at nowhere"),
    ],
)
def test_a_wrong_path_is_a_mistake(world, setting, value, expected):
    with pytest.raises(Mistake, match=expected):
        evaluate(config(world, **{setting: value}))


def test_fitting_the_probe_on_the_test_images_is_a_mistake(world):
    with pytest.raises(Mistake, match="both test_shards and probe_shards"):
        evaluate(config(world, probe_shards=world / "clean"))


def test_another_victim_than_the_one_that_scored_is_a_mistake(world, tmp_path):
    settings = read_manifest(world / "honest_scores").info["settings"]
    settings["victim"]["path"] = str(world / "victim")
    changed_manifest(world, tmp_path, lambda rows: rows, {"settings": settings})
    with pytest.raises(Mistake, match="has changed since it scored"):
        evaluate(config(world, honest_manifest=tmp_path))


def test_the_gallery_shows_flagged_poison_first_and_the_hardest_clean_samples(scan):
    chosen = choose_gallery(scan, "dede_null_ratio", 4, seed=0)
    score = scan.table["dede_null_ratio"].to_numpy(zero_copy_only=False)
    assert all(scan.is_poisoned[chosen["poisoned"]])
    assert score[chosen["poisoned"]].tolist() == sorted(score[scan.is_poisoned & scan.is_scored], reverse=True)[:4]
    assert not any(scan.is_poisoned[chosen["clean"]])
    assert len(set(chosen["clean"])) == 4
    flagged = scan.table["flagged"].to_numpy(zero_copy_only=False)
    order = sorted(np.flatnonzero(~scan.is_poisoned & scan.is_scored), key=lambda i: (not flagged[i], -score[i]))
    assert chosen["clean"][2:] == order[:2]


def test_the_words_follow_the_numbers(metrics):
    assert "what the backdoored victim adds" in " ".join(reading(metrics))
    alike = json.loads(json.dumps(metrics))
    alike["scores"]["dede_null_ratio"]["difference"] = {"value": 0.01, "low": -0.05, "high": 0.07}
    assert "the stamp and not the backdoor" in " ".join(reading(alike))


def test_the_difference_of_two_aurocs_knows_that_they_share_their_images():
    rng = np.random.default_rng(0)
    is_poisoned = np.arange(400) < 80
    shared = rng.normal(size=400) + is_poisoned
    one, other = shared + rng.normal(size=400) / 4, shared + rng.normal(size=400) / 4 - is_poisoned / 2
    difference = auroc_difference(one, other, is_poisoned)
    assert difference.value == pytest.approx(auroc(one, is_poisoned).value - auroc(other, is_poisoned).value)
    alone = auroc(one, is_poisoned)
    assert difference.high - difference.low < alone.high - alone.low
    assert difference.low < difference.value < difference.high
    swapped = auroc_difference(other, one, is_poisoned)
    assert (swapped.low, swapped.high) == pytest.approx((-difference.high, -difference.low))
    assert auroc_difference(one, one, is_poisoned).value == 0


def test_the_difference_covers_what_it_promises():
    """Two equally good scores: 95 % limits hold zero about 95 % of the time."""
    rng = np.random.default_rng(0)
    is_poisoned = np.arange(230) < 30
    covered = 0
    for _ in range(300):
        shared = rng.normal(size=230) + is_poisoned
        limits = auroc_difference(shared + rng.normal(size=230), shared + rng.normal(size=230), is_poisoned)
        covered += limits.low <= 0 <= limits.high
    assert 0.91 < covered / 300 < 0.99

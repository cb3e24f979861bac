"""The evaluation of a small planted world: table and numbers that agree, and joins that must match."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from evaluation import CONTROLS, NUM, NUM_POISONED, SCORES, config

from dede_ray.evaluation.evaluate import EvaluateConfig, evaluate
from dede_ray.evaluation.measure import Verdict, write_record
from dede_ray.evaluation.results import join, reading, table
from dede_ray.metrics import proportion
from dede_ray.models.victims import OpenClipVictim, load_victim
from dede_ray.runtime.config import Mistake
from dede_ray.scan.manifest import read_manifest, write_manifest
from dede_ray.training.downstream import Behaviour

pytestmark = pytest.mark.trains


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


def test_of_a_victim_below_its_gate_no_number_of_the_detector_is_quoted(world, tmp_path):
    evaluate(config(world, output=tmp_path))
    assert (tmp_path / "figures" / "roc.png").is_file()
    text = evaluate(config(world, output=tmp_path, gate={}))
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["void"] == metrics["gate"]["reason"]
    assert text.startswith(f"**VOID: {metrics['void']}")
    assert metrics["scores"].keys() >= {"dede_sum"}
    page = (tmp_path / "report.html").read_text()
    for quoted in (text, page):
        assert "no number of the detector is quoted" in quoted
        assert "AUROC" not in quoted
        assert "recall" not in quoted
        assert "of them are poisoned" not in quoted
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["gallery.png"]


def test_equal_inputs_give_equal_bytes(world, report):
    before = {path: path.read_bytes() for path in report.rglob("*") if path.is_file()}
    evaluate(config(world))
    assert len(before) == 8
    assert {path for path, content in before.items() if path.read_bytes() != content} == set()


def test_without_an_honest_victim_the_evaluation_is_void(world, tmp_path):
    text = evaluate(config(world, honest_manifest=None, output=tmp_path))
    assert "no number of the detector is quoted" in text
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


def test_the_words_follow_the_numbers(metrics):
    assert "what the backdoored victim adds" in " ".join(reading(metrics))
    alike = json.loads(json.dumps(metrics))
    alike["scores"]["dede_null_ratio"]["difference"] = {"value": 0.01, "low": -0.05, "high": 0.07}
    assert "the stamp and not the backdoor" in " ".join(reading(alike))


def test_a_victim_that_failed_its_gate_when_it_was_made_is_void(world, tmp_path):
    settings = OpenClipVictim(path=str(world / "victim"))
    victim = load_victim(settings)
    interval = proportion(1, 2)
    verdict = Verdict(False, "the patch did not take", {"probe": Behaviour(interval, interval)}, None)
    about = {"attack": "badclip", "settings": {}, "trigger": None, "target_label": 1, "training_data": [], "seed": 0}
    try:
        write_record(victim, settings, verdict, None, **about)
        text = evaluate(config(world, output=tmp_path))
    finally:
        (world / "victim" / "victim.json").unlink()
    assert text.startswith("**VOID: victim.json: the patch did not take")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["victim_record"]["attack"] == "badclip"


def test_all_heads_are_measured_with_both_victims(world, tmp_path):
    heads = [{"kind": "probe"}, {"kind": "mlp", "epochs": 2}, {"kind": "knn", "k": 5}]
    settings = {**config(world, output=tmp_path).model_dump(), "heads": heads, "probe_poison_rate": 0.1}
    evaluate(EvaluateConfig.model_validate(settings))
    gate = json.loads((tmp_path / "metrics.json").read_text())["gate"]
    fitted = ["probe", "mlp", "knn", "probe_poisoned", "mlp_poisoned", "knn_poisoned"]
    assert list(gate["victim"]) == list(gate["honest"]) == ["zero_shot", *fitted]
    assert "- knn-poisoned: CA" in (tmp_path / "table.md").read_text()

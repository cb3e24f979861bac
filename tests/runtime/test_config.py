"""Settings are strict, mistakes end in one message, and an output folder belongs to the run that claimed it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from dede_ray.poisoning.poison import PoisonConfig
from dede_ray.runtime.cli import JOBS, main
from dede_ray.runtime.cli import run_job as run_from_command_line
from dede_ray.runtime.config import Config, Mistake, claim, finish, load, read_json, write_atomically, write_json
from dede_ray.runtime.lease import leased
from tests.benchmarks.speed import SpeedConfig

ROOT = Path(__file__).parents[2]

POISON = """
shards: clean/*.tar
output: poisoned
trigger: {kind: patch, size_px: 4}
rate: 0.05
target_label: 0
"""


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "run.yaml").write_text(text)
        return str(tmp_path / "run.yaml")

    return write


class Small(Config):
    """Settings for these tests."""

    number: int = Field(1, gt=0)
    """A number."""
    output: str = "out"
    """A folder."""


# --- loading


def test_overrides_reach_into_the_tree(yaml_file):
    argv = [yaml_file(POISON), "--trigger.size-px", "9", "--rate", "0.2", "--limits.max-pixels", "100", "--clean-label"]
    config = load(PoisonConfig, argv)
    assert (config.trigger.size_px, config.rate, config.limits.max_pixels, config.clean_label) == (9, 0.2, 100, True)
    assert config.target_label == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("rate:", "rat:"), r"rat: unknown setting; did you mean `rate`\?"),
        (("size_px", "size_pxl"), r"size_pxl: unknown setting; did you mean `size_px`\?"),
        (("kind: patch", "kind: pach"), "pach"),
        (("rate: 0.05", "rate: 1.5"), "rate: Input should be less than 1, found 1.5"),
        (("rate: 0.05", "rate: lots"), "rate: Input should be a valid number.*, found 'lots'"),
        (("rate: 0.05", ""), "rate: required, but not given"),
        (("size_px: 4", "size_px: -4"), "size_px: Input should be greater than 0, found -4"),
        (("rate: 0.05", "rate: [0.05"), "not valid YAML"),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_found_and_what_is_meant(yaml_file, change, message):
    with pytest.raises(Mistake, match=message):
        load(PoisonConfig, [yaml_file(POISON.replace(*change))])


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just words", "42"])
def test_a_file_that_holds_no_settings_is_a_mistake(yaml_file, text):
    with pytest.raises(Mistake, match="must hold `key: value` settings"):
        load(PoisonConfig, [yaml_file(text)])


def test_a_file_that_is_not_text_is_a_mistake(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00rate")
    with pytest.raises(Mistake, match="not valid YAML"):
        load(PoisonConfig, [str(tmp_path / "run.yaml")])


def test_a_missing_file_is_a_mistake_that_names_the_nearest(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(Mistake, match=r"no config file at configs/digits/poson\.yaml .*configs/digits/poison\.yaml\?"):
        load(PoisonConfig, ["configs/digits/poson.yaml"])


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("configs/score_digits.yaml", "configs/digits/score.yaml"),  # an earlier name: its words in another order
        ("configs/attack_badencoder_cifar10.yaml", "configs/cifar10/attack/badencoder.yaml"),
        ("configs/train_clip_digits_sifted.yaml", "configs/digits/train_clip_sifted.yaml"),
        ("score_digits.yml", "configs/digits/score.yaml"),
        ("configs/demo_smoke.yaml", "configs/smoke.yaml"),
        ("configs/badnets.yaml", "configs/cifar10/poison/badnets.yaml"),  # its file name alone
        (
            "configs/train_clip.yaml",
            "configs/cifar10/train_clip.yaml or configs/cluster/train_clip.yaml or configs/digits",
        ),
    ],
)
def test_a_missing_file_is_recognised_by_its_words_in_any_order_and_by_its_name(path, meant, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(Mistake, match=rf"; did you mean {meant}"):
        load(PoisonConfig, [path])


def test_a_missing_file_is_looked_for_among_those_beside_it(tmp_path):
    (tmp_path / "my_scores.yaml").write_text(POISON)
    with pytest.raises(Mistake, match=r"did you mean .*/my_scores\.yaml\?"):
        load(PoisonConfig, [str(tmp_path / "my_score.yaml")])
    with pytest.raises(Mistake, match=r"\)$"):  # nothing is near
        load(PoisonConfig, [str(tmp_path / "entirely_else.yaml")])


def test_known_settings_are_listed_once(yaml_file):
    with pytest.raises(Mistake, match="known settings") as caught:
        load(PoisonConfig, [yaml_file(POISON + "detectors: []\nsampling: 3\n")])
    assert str(caught.value).count("unknown setting") == 2
    assert str(caught.value).count("known settings: ") == 1


@pytest.mark.parametrize(
    "override", [["--rate", "1.5"], ["--rate", "lots"], ["--raet", "0.1"], ["--trigger.position", "left"]]
)
def test_a_wrong_override_names_the_setting_and_ends_with_code_2(yaml_file, capsys, override):
    with pytest.raises((SystemExit, Mistake)) as caught:
        load(PoisonConfig, [yaml_file(POISON), *override])
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 2
    message = capsys.readouterr().err + str(caught.value)
    assert override[0].lstrip("-") in message


def test_settings_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Small().number = 2


# --- claiming an output folder


def test_a_finished_run_is_found_again_with_its_result(tmp_path):
    folder = tmp_path / "out"
    assert claim(folder, Small()) is None
    assert claim(folder, Small()) is None  # unfinished: work remains
    finish(folder, Small(), {"answer": 42})
    assert claim(folder, Small()) == {"answer": 42}


def test_a_folder_of_other_settings_is_refused_and_the_difference_named(tmp_path):
    claim(tmp_path, Small())
    finish(tmp_path, Small(), {})
    with pytest.raises(Mistake, match="number: 1 there, 2 here"):
        claim(tmp_path, Small(number=2))


def test_unfinished_work_of_other_settings_is_refused_too(tmp_path):
    claim(tmp_path, Small())
    (tmp_path / "train-00000.tar").write_text("work")
    with pytest.raises(Mistake, match="number: 1 there, 2 here"):
        claim(tmp_path, Small(number=2))


def test_a_run_that_failed_before_it_wrote_anything_leaves_the_folder_to_the_corrected_settings(tmp_path):
    claim(tmp_path, Small())
    assert claim(tmp_path, Small(number=2)) is None
    finish(tmp_path, Small(number=2), {"answer": 2})
    assert claim(tmp_path, Small(number=2)) == {"answer": 2}


@pytest.mark.parametrize("take", [lambda folder: claim(folder, Config()), lambda folder: leased(folder).__enter__()])
@pytest.mark.parametrize("below", ["", "/run"])
def test_a_file_in_the_place_of_an_output_folder_is_a_mistake(tmp_path, take, below):
    (tmp_path / "there").write_text("a file")
    with pytest.raises(Mistake, match=r"nothing can be written to the output .*there.*; choose another folder"):
        take(f"{tmp_path / 'there'}{below}")


def test_a_record_that_cannot_be_read_is_a_mistake(tmp_path):
    (tmp_path / "run.json").write_text("{ half")
    with pytest.raises(Mistake, match=r"run\.json"):
        claim(tmp_path, Small())
    with pytest.raises(Mistake, match="no manifest at"):
        read_json(tmp_path / "manifest.json", "manifest")


def test_files_are_written_whole_the_same_bytes_each_time_and_nothing_stays_beside_them(tmp_path):
    write_atomically(tmp_path / "new" / "a.txt", "old")
    write_atomically(tmp_path / "new" / "a.txt", "naïve")
    assert (tmp_path / "new" / "a.txt").read_text(encoding="utf-8") == "naïve"
    for name in ("b.json", "c.json"):
        write_json(tmp_path / "new" / name, {"z": 1, "a": [0.1, "猫"]})
    assert (tmp_path / "new" / "b.json").read_bytes() == (tmp_path / "new" / "c.json").read_bytes()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.txt", "b.json", "c.json"]
    with pytest.raises(ValueError, match="Out of range"):  # JSON has no NaN
        write_json(tmp_path / "d.json", {"loss": float("nan")})


# --- a job on the command line


def run_job(*argv: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "jobs/ingest.py", *argv]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no config given; run: python jobs/ingest.py <config.yaml>"),
        (["configs/ingest_digit.yaml"], "did you mean configs/digits/ingest.yaml?"),
        (["configs/digits/poison.yaml"], "does not describe a IngestConfig"),
        (["--seed", "3"], "no config given; run: python jobs/ingest.py <config.yaml> --seed 3"),
    ],
)
def test_a_mistake_ends_a_job_with_code_2_and_one_message(argv, message):
    job = run_job(*argv)
    assert job.returncode == 2
    assert message in job.stderr
    assert job.stderr.startswith("error: ")
    assert "Traceback" not in job.stderr
    assert job.stdout == ""


@pytest.mark.ray
def test_a_job_prints_its_one_line_and_running_it_again_the_same(tmp_path):
    argv = ["configs/digits/ingest.yaml", "--output", str(tmp_path / "digits")]
    first, second = run_job(*argv), run_job(*argv)
    assert (first.returncode, second.returncode) == (0, 0)
    assert (
        first.stdout
        == second.stdout
        == (f"train 1,000, calibration 500, test 297 samples in {tmp_path / 'digits'}; left out: none\n")
    )


def test_help_is_written_by_the_field_docstrings():
    job = run_job("--help")
    assert job.returncode == 0
    assert "--samples-per-shard" in job.stdout
    assert "Samples in one tar" in job.stdout


def test_overrides_follow_directly_where_a_job_has_default_settings(capsys):
    run_from_command_line(Small, lambda settings: settings.number, "small", ["--number", "7"], Small(output="there"))
    assert capsys.readouterr().out == "7\n"
    with pytest.raises(SystemExit):
        run_from_command_line(Small, print, "small", ["--number", "-7"], Small())
    assert "number" in capsys.readouterr().err


def test_a_job_that_does_not_exist_is_a_mistake_that_names_the_nearest(monkeypatch, capsys):
    for typed, hint in (("scroe", "did you mean score?"), ("x", "there are demo, ingest, check")):
        monkeypatch.setattr(sys, "argv", ["dede-ray", typed])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert f"error: no job is called '{typed}'; {hint}" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [job.settings_class() for job in JOBS.values()] + [SpeedConfig])
def test_every_job_explains_its_settings(kind, capsys):
    with pytest.raises(SystemExit) as ended:
        run_from_command_line(kind, print, "dede-ray job", ["--help"])
    assert ended.value.code == 0
    first = next(name for name, field in kind.model_fields.items() if "str" in str(field.annotation))
    assert f"--{first.replace(chr(95), chr(45))}" in capsys.readouterr().out

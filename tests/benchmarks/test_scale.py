"""The cost model: small runs predict a large one."""

from __future__ import annotations

import pytest

from dede_ray.runtime.config import Mistake
from tests.benchmarks.scale import Line, ScaleConfig, scale


def test_a_line_through_two_runs_gives_the_cost_of_a_start_and_of_each_sample():
    line = Line.through([(100, 7.0), (250, 8.5), (300, 9.0)])
    assert (line.start, line.each) == (pytest.approx(6), pytest.approx(0.01))
    assert line.at(1000) == pytest.approx(16)


def test_sizes_must_rise(tmp_path):
    with pytest.raises(Mistake, match=r"\[10, 30, 20\] must rise"):
        scale(ScaleConfig(output=str(tmp_path), num_samples=[10, 30, 20]))


@pytest.mark.slow
def test_a_table_of_three_small_runs_is_made_of_what_they_wrote(clip_config, tmp_path):
    config = ScaleConfig(
        output=str(tmp_path), num_samples=[100, 200, 400], samples_per_shard=100, chunk_size=20, model=str(clip_config)
    )
    table = scale(config)
    assert (
        "| ledger, files | 8 | 14 | 26 |" in table
    )  # pass.json, timing.json, and for each shard 5 parts, 1 end marker
    assert "ledger_files: 26 predicted, 26 measured, ratio 1.00" in table
    assert scale(config) == table

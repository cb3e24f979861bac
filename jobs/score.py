"""Score shards and write the manifest of suspected samples.

python jobs/score.py configs/score_digits.yaml --decision.q 0.05

With a demo_*.yaml it runs its part of that demo, whatever comes before it included; without a config, of the smallest.
"""

from functools import partial

from dede_ray.config import main
from dede_ray.pipeline import run_up_to
from dede_ray.scoring import ScoreConfig, score
from dede_ray.session import start_ray


def job(config: ScoreConfig) -> str:
    start_ray(config)
    return score(config).summary()


if __name__ == "__main__":
    main(ScoreConfig, job, in_demo=partial(run_up_to, "score"))

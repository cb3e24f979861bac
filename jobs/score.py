"""Score shards and write the manifest of suspected samples.

python jobs/score.py configs/score_digits.yaml --decision.q 0.05

Without a config it runs its part of configs/demo_smoke.yaml, whatever comes before it included.
"""

from dede_ray.config import main
from dede_ray.pipeline import smallest
from dede_ray.scoring import ScoreConfig, score
from dede_ray.session import start_ray


def job(config: ScoreConfig) -> str:
    start_ray()
    return score(config).summary()


if __name__ == "__main__":
    main(ScoreConfig, job, without_config=lambda: smallest("score"))

"""Examine shards before somebody trains or scores on them, without changing them: the shard doctor.

python jobs/check.py configs/check.yaml --shards 'shards/train-*.tar' --output runs/check
"""

from dede_ray.check import CheckConfig, check
from dede_ray.config import main
from dede_ray.session import start_ray


def job(config: CheckConfig) -> str:
    start_ray(config)
    return check(config)


if __name__ == "__main__":
    main(CheckConfig, job)

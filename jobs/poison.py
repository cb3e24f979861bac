"""Stamp a trigger into a part of clean shards, and write down into which.

python jobs/poison.py configs/poison_digits.yaml --rate 0.01
"""

from dede_ray.attacks.poison import PoisonConfig, poison
from dede_ray.config import main
from dede_ray.session import start_ray


def job(config: PoisonConfig) -> str:
    start_ray(config)
    return poison(config)


if __name__ == "__main__":
    main(PoisonConfig, job)

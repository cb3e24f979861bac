"""Write shards without the flagged samples, and lists that leave them out elsewhere.

python jobs/sift.py configs/sift_digits.yaml
"""

from dede_ray.config import main
from dede_ray.session import start_ray
from dede_ray.sift import SiftConfig, sift


def job(config: SiftConfig) -> str:
    start_ray(config)
    return sift(config)


if __name__ == "__main__":
    main(SiftConfig, job)

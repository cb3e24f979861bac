"""Search encoders for the smallest stamp that makes all images look alike to them; a small one means a backdoor.

python jobs/decree.py configs/decree_cifar10.yaml
"""

from dede_ray.config import main
from dede_ray.detectors.decree import DecreeConfig, run
from dede_ray.session import start_ray


def job(config: DecreeConfig) -> str:
    start_ray(config)
    return run(config)


if __name__ == "__main__":
    main(DecreeConfig, job)

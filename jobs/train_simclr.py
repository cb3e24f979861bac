"""Train an image encoder by SimCLR on (poisoned) shards, and the DeDe decoder against the frozen encoder.

python jobs/train_simclr.py configs/train_simclr_cifar10.yaml
"""

from dede_ray.config import main
from dede_ray.session import start_ray
from dede_ray.simclr import SimclrConfig, train


def job(config: SimclrConfig) -> str:
    start_ray(config)
    return train(config)


if __name__ == "__main__":
    main(SimclrConfig, job)

"""Train CLIP on (poisoned) shards, and the DeDe decoder against the frozen CLIP.

python jobs/train_clip.py configs/train_clip_digits.yaml
ray job submit --working-dir . -- python jobs/train_clip.py configs/train_clip_digits.yaml

Without a config it runs its part of configs/demo_smoke.yaml, whatever comes before it included.
"""

from dede_ray.config import main
from dede_ray.pipeline import smallest
from dede_ray.session import start_ray
from dede_ray.training import TrainConfig, train


def job(config: TrainConfig) -> str:
    start_ray()
    return train(config)


if __name__ == "__main__":
    main(TrainConfig, job, without_config=lambda: smallest("train_clip"))

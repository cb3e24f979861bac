"""Train CLIP on (poisoned) shards, and the DeDe decoder against the frozen CLIP.

python jobs/train_clip.py configs/train_clip_digits.yaml
ray job submit --working-dir . -- python jobs/train_clip.py configs/demo_digits.yaml

With a demo_*.yaml it runs its part of that demo, whatever comes before it included; without a config, of the smallest.
"""

from functools import partial

from dede_ray.config import main
from dede_ray.pipeline import run_up_to
from dede_ray.session import start_ray
from dede_ray.training import TrainConfig, train


def job(config: TrainConfig) -> str:
    start_ray(config)
    return train(config)


if __name__ == "__main__":
    main(TrainConfig, job, in_demo=partial(run_up_to, "train_clip"))

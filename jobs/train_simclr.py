"""Train an image encoder by SimCLR on (poisoned) shards, and the DeDe decoder against the frozen encoder.

python jobs/train_simclr.py configs/cifar10/train_simclr.yaml
"""

from dede_ray.runtime.cli import main

if __name__ == "__main__":
    main("train_simclr")

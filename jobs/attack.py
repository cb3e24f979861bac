"""Tamper with a clean encoder: BadEncoder, DRUPE, CLIP text-on-pair, BadCLIP. For research on defences.

python jobs/attack.py configs/cifar10/attack/badencoder.yaml
"""

from dede_ray.runtime.cli import main

if __name__ == "__main__":
    main("attack")

"""Tamper with a clean encoder: BadEncoder, DRUPE, CLIP text-on-pair, BadCLIP. For research on defences.

python jobs/attack.py configs/attack_badencoder_cifar10.yaml
"""

from dede_ray.attacks.attack import AttackConfig, attack
from dede_ray.config import main
from dede_ray.session import start_ray


def job(config: AttackConfig) -> str:
    start_ray(config)
    return attack(config)


if __name__ == "__main__":
    main(AttackConfig, job)

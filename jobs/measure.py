"""Measure what a victim does, clean accuracy and attack success rate beside its honest twin; writes victim.json.

python jobs/measure.py configs/measure_cifar10.yaml
"""

from dede_ray.activation import MeasureConfig, measure_victim
from dede_ray.config import main

if __name__ == "__main__":
    main(MeasureConfig, measure_victim)

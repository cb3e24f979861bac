"""Measure what a victim does, clean accuracy and attack success rate beside its honest twin; writes victim.json.

python jobs/measure.py configs/cifar10/measure_encoder.yaml
"""

from dede_ray.runtime.cli import main

if __name__ == "__main__":
    main("measure")

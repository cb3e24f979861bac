"""Make a zoo of victims: every attack, each victim with its honest twin and proof that its backdoor works.

python jobs/zoo.py configs/cifar10/zoo.yaml
"""

from dede_ray.runtime.cli import main

if __name__ == "__main__":
    main("zoo")

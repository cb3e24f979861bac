"""Make a zoo of victims: every attack, each victim with its honest twin and proof that its backdoor works.

python jobs/zoo.py configs/zoo_cifar10.yaml
"""

from dede_ray.config import main
from dede_ray.zoo import ZooConfig, build_zoo

if __name__ == "__main__":
    main(ZooConfig, build_zoo)

"""Search encoders for the smallest stamp that makes all images look alike to them; a small one means a backdoor.

python jobs/decree.py configs/cifar10/decree.yaml
"""

from dede_ray.runtime.cli import main

if __name__ == "__main__":
    main("decree")

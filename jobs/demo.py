"""From images that need no download to a list of poisoned samples and a page about it.

python jobs/demo.py configs/digits/demo.yaml
"""

from dede_ray.runtime.cli import main

if __name__ == "__main__":
    main("demo")

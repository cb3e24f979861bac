"""Stamp a trigger into a part of clean shards, and write down into which.

python jobs/poison.py configs/digits/poison.yaml --rate 0.01
"""

from dede_ray.runtime.cli import main

if __name__ == "__main__":
    main("poison")

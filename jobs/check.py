"""Examine shards before they are trained on or scored, without changing them: the shard doctor.

python jobs/check.py configs/digits/check.yaml --shards 'shards/train-*.tar' --output runs/check
"""

from dede_ray.runtime.cli import main

if __name__ == "__main__":
    main("check")

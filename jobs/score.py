"""Score shards and write the manifest of suspected samples.

python jobs/score.py configs/digits/score.yaml --decision.q 0.05

Given the config of a demo it runs that demo up to here; without a config, the smallest one.
"""

from dede_ray.runtime.cli import main

if __name__ == "__main__":
    main("score")

"""Train CLIP on (poisoned) shards, and the DeDe decoder against the frozen CLIP.

python jobs/train_clip.py configs/digits/train_clip.yaml
ray job submit --working-dir . -- python jobs/train_clip.py configs/digits/demo.yaml

Given the config of a demo it runs that demo up to here; without a config, the smallest one.
"""

from dede_ray.runtime.cli import main

if __name__ == "__main__":
    main("train_clip")

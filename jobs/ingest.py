"""Turn a source of images into captioned WebDataset shards.

python jobs/ingest.py configs/digits/ingest.yaml
"""

from dede_ray.runtime.cli import main

if __name__ == "__main__":
    main("ingest")

"""Turn a source of images into captioned WebDataset shards.

python jobs/ingest.py configs/ingest_digits.yaml
"""

from dede_ray.config import main
from dede_ray.ingest import IngestConfig, ingest

if __name__ == "__main__":
    main(IngestConfig, ingest)

"""Turn a source of images into captioned WebDataset shards.

python jobs/ingest.py configs/ingest_digits.yaml
"""

from dede_ray.config import main
from dede_ray.ingest import IngestConfig, ingest
from dede_ray.session import check_output, start_ray


def job(config: IngestConfig) -> str:
    if config.workers != 1:
        start_ray(config)
    else:
        check_output(config)
    return ingest(config)


if __name__ == "__main__":
    main(IngestConfig, job)

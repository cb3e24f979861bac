"""Measure our CLIP trainer beside open_clip's, our other passes beside bare loops, ingestion beside ShardWriter.

python jobs/speed.py configs/speed_clip.yaml
python jobs/speed.py configs/speed.yaml
python jobs/speed.py configs/speed_ingest.yaml
python jobs/speed.py configs/speed_detectors.yaml
"""

from dede_ray.config import main
from dede_ray.session import start_ray
from dede_ray.speed import SpeedConfig, measure_speed


def job(config: SpeedConfig) -> str:
    start_ray(config)
    return measure_speed(config)


if __name__ == "__main__":
    main(SpeedConfig, job)

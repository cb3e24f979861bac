"""Measure our CLIP trainer beside open_clip's, our other passes beside bare loops, ingestion beside ShardWriter,
decoder training and scoring beside the code that DeDe's authors released.

python jobs/speed.py configs/speed_clip.yaml
python jobs/speed.py configs/speed.yaml
python jobs/speed.py configs/speed_ingest.yaml
python jobs/speed.py configs/speed_detectors.yaml
python jobs/speed.py configs/speed_dede.yaml --reference.path <checkout of github.com/tardisblue9/DeDe>
"""

from dede_ray.config import main
from dede_ray.session import start_ray
from dede_ray.speed import SpeedConfig, measure_speed


def job(config: SpeedConfig) -> str:
    start_ray(config)
    return measure_speed(config)


if __name__ == "__main__":
    main(SpeedConfig, job)

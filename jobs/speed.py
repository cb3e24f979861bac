"""Measure our CLIP trainer beside open_clip's, and our trainer and our score pass beside bare loops.

python jobs/speed.py configs/speed_clip.yaml
python jobs/speed.py configs/speed.yaml
"""

from dede_ray.config import main
from dede_ray.session import start_ray
from dede_ray.speed import SpeedConfig, measure_speed


def job(config: SpeedConfig) -> str:
    start_ray()
    return measure_speed(config)


if __name__ == "__main__":
    main(SpeedConfig, job)

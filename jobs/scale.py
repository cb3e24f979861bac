"""Measure what scoring costs at several sizes, and predict what it costs at larger ones.

python jobs/scale.py configs/scale.yaml
"""

from dede_ray.config import main
from dede_ray.scale import ScaleConfig, scale

if __name__ == "__main__":
    main(ScaleConfig, scale)

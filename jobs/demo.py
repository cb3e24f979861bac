"""From images that need no download to a list of poisoned samples and a page about it.

python jobs/demo.py configs/demo_digits.yaml
"""

from dede_ray.config import main
from dede_ray.pipeline import PipelineConfig, run_steps

if __name__ == "__main__":
    main(PipelineConfig, run_steps)

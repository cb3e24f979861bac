"""Score while processes and nodes are killed, and compare with a run in peace.

python jobs/chaos.py configs/chaos.yaml
"""

from dede_ray.chaos import ChaosConfig, chaos
from dede_ray.config import main

if __name__ == "__main__":
    main(ChaosConfig, chaos)

"""Attack x victim x detector over several seeds, every number beside its controls; tables, figures, results.parquet.

python jobs/benchmark.py configs/cifar10/benchmark.yaml
"""

from dede_ray.runtime.cli import main

if __name__ == "__main__":
    main("benchmark")

"""Attack x victim x detector over several seeds, every number beside its controls; tables, figures, results.parquet.

python jobs/benchmark.py configs/benchmark_cifar10.yaml
"""

from dede_ray.benchmark import BenchmarkConfig, benchmark
from dede_ray.config import main

if __name__ == "__main__":
    main(BenchmarkConfig, benchmark)

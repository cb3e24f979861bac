"""Write shards without the flagged samples, and lists that leave them out elsewhere.

python jobs/sift.py configs/digits/sift.yaml
"""

from dede_ray.runtime.cli import main

if __name__ == "__main__":
    main("sift")

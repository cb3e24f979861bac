"""Look in the whole corpus for what the surest samples of a manifest have in common, and write a manifest of it.

python jobs/amplify.py configs/digits/amplify.yaml
"""

from dede_ray.runtime.cli import main

if __name__ == "__main__":
    main("amplify")

"""Look in the whole corpus for what the surest samples of a manifest have in common, and write a manifest of it.

python jobs/amplify.py configs/amplify_digits.yaml
"""

from dede_ray.amplification import AmplifyConfig, amplify_manifest
from dede_ray.config import main
from dede_ray.session import start_ray


def job(config: AmplifyConfig) -> str:
    start_ray(config)
    return amplify_manifest(config)


if __name__ == "__main__":
    main(AmplifyConfig, job)

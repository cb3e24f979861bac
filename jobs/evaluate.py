"""Hold a manifest against the truth: numbers, a table, figures and a page to look at.

    python jobs/evaluate.py configs/evaluate_digits.yaml --output runs/digits/report

Takes seconds on a laptop: only the test and probe images and the gallery's are embedded again. Ends with the table
and the path of the page.
"""

from dede_ray.config import main
from dede_ray.report import EvaluateConfig, evaluate
from dede_ray.session import check_output


def job(config: EvaluateConfig) -> str:
    check_output(config)
    return evaluate(config)


if __name__ == "__main__":
    main(EvaluateConfig, job)

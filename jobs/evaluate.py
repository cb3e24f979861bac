"""Compare a manifest with the truth: numbers, a table, figures and a page to look at.

    python jobs/evaluate.py configs/digits/evaluate.yaml --output runs/digits/report

Takes seconds on a laptop: only the test and probe images and the gallery's are embedded again. Ends with the table
and the path of the page.
"""

from dede_ray.runtime.cli import main

if __name__ == "__main__":
    main("evaluate")

"""dede_ray: which samples of an image(-text) corpus are poisoned, how sure we are, and why.

    import dede_ray

    manifest = dede_ray.score({...})            # shards x encoder x detectors -> list; starts Ray where none runs
    manifest.flagged                            # ids of the samples on the list
    manifest.to_pandas().query("flagged")       # the same with scores and p-values

Every name below is imported when it is first used. The examples in their docstrings run after `dede-ray demo`, in the
same folder.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dede_ray.data.shards import list_shards as list_shards
    from dede_ray.evaluation.evaluate import evaluate as evaluate
    from dede_ray.models.victims import load_victim as load_victim
    from dede_ray.runtime.config import Mistake as Mistake
    from dede_ray.scan.decisions import Conformal as Conformal
    from dede_ray.scan.manifest import Manifest as Manifest
    from dede_ray.scan.manifest import read_manifest as read_manifest
    from dede_ray.scan.score import ScoreConfig as ScoreConfig
    from dede_ray.scan.score import score as score
    from dede_ray.scan.sift import sift as sift

__version__ = "0.2.0"

_PLACES = {
    "score": "scan.score",
    "ScoreConfig": "scan.score",
    "Manifest": "scan.manifest",
    "read_manifest": "scan.manifest",
    "sift": "scan.sift",
    "evaluate": "evaluation.evaluate",
    "load_victim": "models.victims",
    "list_shards": "data.shards",
    "Conformal": "scan.decisions",
    "Mistake": "runtime.config",
}
__all__ = [*_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'dede_ray' has no attribute {name!r}; its public names are {', '.join(_PLACES)}")
    return getattr(importlib.import_module(f"dede_ray.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_PLACES]

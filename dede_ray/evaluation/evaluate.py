"""Evaluation: compare a manifest with the truth, and show the result in numbers, figures and one page.

`evaluate` answers three questions in the order in which a reader should ask them. Is the victim backdoored at all
(the activation gate of measure.py)? What was flagged, and how much of it is poisoned? And does the detector see the
backdoor, or only the stamp: the honest victim, scored on the same images, is shown beside every number.

It writes `metrics.json` (everything: results.py), `table.md` and `report.html` (both made from it, the latter and
`figures/` by page.py). Equal inputs give equal bytes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from dede_ray.evaluation.measure import Examination, Verdict, VictimRecord, read_record
from dede_ray.evaluation.page import draw_page, make_gallery
from dede_ray.evaluation.results import join, measure, table
from dede_ray.models.victims import Victim, best_device
from dede_ray.poisoning.poison import PoisonConfig, read_attack
from dede_ray.runtime.config import Mistake, as_settings, write_atomically, write_json
from dede_ray.runtime.session import check_output
from dede_ray.scan.manifest import Manifest, read_manifest
from dede_ray.scan.score import settings_of, victim_of


class EvaluateConfig(Examination):
    """Settings of `dede-ray evaluate`: which manifest to compare with which truth."""

    manifest: str
    """Folder that `dede-ray score` wrote for the victim."""
    honest_manifest: str | None = None
    """The same shards scored with the honest victim; without it the evaluation is void."""
    truth: str
    """truth.parquet of the poisoned shards."""
    attack: str
    """Folder of the poisoned shards; its run.json holds the trigger and the target."""
    output: str
    """Folder for the page, the table, the numbers and the figures; overwritten."""
    num_gallery: int = Field(8, ge=1)
    """Poisoned samples in the gallery, and as many clean ones."""


def evaluate(config: EvaluateConfig | dict[str, Any] | str | Path) -> str:
    """Evaluate a manifest; see the module's first paragraph.

    Returns:
        The table, and the path of the page.

    Raises:
        Mistake: manifest, truth and honest manifest are not about the same samples, a victim is no longer the one that
            scored, or something is missing.

    Example:
        >>> import dede_ray
        >>> said = dede_ray.evaluate({
        ...     "manifest": "runs/digits/scores",
        ...     "truth": "runs/digits/poisoned/truth.parquet",
        ...     "attack": "runs/digits/poisoned",
        ...     "test_shards": "runs/digits/clean/test-*.tar",
        ...     "probe_shards": "runs/digits/clean/train-*.tar",
        ...     "output": "runs/mine_report",
        ... })
        >>> said.splitlines()[-1]
        'page: runs/mine_report/report.html'
    """
    config = as_settings(EvaluateConfig, config)
    check_output(config)
    manifest = read_manifest(config.manifest)
    honest = read_manifest(config.honest_manifest) if config.honest_manifest else None
    scan = join(manifest, honest, read_truth(config.truth), config.truth)
    attack = read_attack(config.attack)
    victim = _load_victim(manifest)
    record = read_record(victim, settings_of(manifest).victim)
    verdict, target_name = _gate(config, attack, victim, _load_victim(honest) if honest else None, record)
    metrics = {
        **measure(scan, manifest.info, verdict),
        "victim_record": record and record.model_dump(mode="json"),
        "attack": {"trigger": attack.trigger.kind, "rate": attack.rate, "target": target_name},
        "made": {
            "settings": config.model_dump(mode="json"),
            **{
                role: {name: one.info[name] for name in ("victim", "detectors", "versions", "settings")}
                for role, one in (("victim", manifest), ("honest", honest))
                if one is not None
            },
        },
    }
    settings, judged = settings_of(manifest), manifest.info["decision"]["score"]
    gallery = make_gallery(scan, settings, victim, judged, config.num_gallery, config.seed)
    page, figures = draw_page(scan, metrics, gallery)
    output = Path(config.output)
    for stale in (output / "figures").glob("*.png"):
        stale.unlink()
    for name, picture in figures.items():
        write_atomically(output / "figures" / f"{name}.png", picture)
    write_json(output / "metrics.json", metrics)
    write_atomically(output / "table.md", table(metrics) + "\n")
    write_atomically(output / "report.html", page)
    write_json(output / "run.json", {"settings": config.model_dump(mode="json")})
    return "\n".join([table(metrics), "", *_found(manifest, honest), f"page: {output / 'report.html'}"])


def _found(manifest: Manifest, honest: Manifest | None) -> list[str]:
    """The groups of both manifests, a line each."""
    lines = [f"finding: {one}" for one in manifest.info.get("groups", ())]
    if honest is not None and "acting_groups" in honest.info.get("counts", {}):
        num = honest.info["counts"]["acting_groups"]
        acts = f"{num:,} groups act" if num else "no group acts"
        lines.append(f"honest victim, same images: {acts}")
    return lines


def read_truth(path: str) -> pa.Table:
    """Which samples of poisoned shards are poisoned, and their captions before and after."""
    columns = ["sample_id", "is_poisoned", "caption", "poisoned_caption"]
    try:
        return pq.read_table(path, columns=columns)
    except FileNotFoundError:
        raise Mistake(
            f"no truth at {path}; `dede-ray poison` writes truth.parquet beside the poisoned shards"
        ) from None
    except (pa.ArrowInvalid, OSError) as error:
        raise Mistake(f"{path} is no truth.parquet with the columns {', '.join(columns)}: {error}") from None


def _load_victim(manifest: Manifest) -> Victim:
    return victim_of(manifest).to(best_device())


def _gate(
    config: EvaluateConfig,
    attack: PoisonConfig,
    victim: Victim,
    honest: Victim | None,
    record: VictimRecord | None,
) -> tuple[Verdict, str]:
    """Measure both victims on the same test images; also the target's name.

    A victim that failed its gate when it was made fails here, whatever these test images say.
    """
    examined = config.examine(
        victim, honest, attack.trigger, attack.target_label, record.attack if record else attack.trigger.kind
    )
    verdict, classes = examined.verdict, examined.classes
    if record and not record.passes:
        verdict = replace(verdict, passes=False, reason=f"victim.json: {record.reason}")
    return verdict, classes.names[attack.target_label] if classes else f"label {attack.target_label}"

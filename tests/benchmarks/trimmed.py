"""What a list loses where nobody has clean samples, and a person looks at a hundred instead.

    python -m tests.benchmarks.trimmed ../shared/data runs/embedded.npz     # a minute to embed, 2 s a draw

Corpora of CIFAR-10's test images as a backdoored WRN-16-1 (NAD's grid, target 5) embeds them, beside an honest
ResNet-20: 5,000 samples of which 1 % are poisoned, `strength` of the way from the clean embedding to the triggered one.
2,500 calibrate and 2,500 are judged, in four ways that differ only in what is known of the first:

    verified    all that calibrate are known to be clean, as a person who looked at each would say
    trimmed     a person who knows the truth looked at the 100 highest, and struck out the poisoned ones
    blind       nobody looked, but the list is made as if all of them were clean
    null        no calibration; the empirical null's list of all 5,000

Recall and false discovery proportion, of what was judged, at q = 0.1; and whether looks were warned about: truthful
ones, and those that strike out the ten highest clean samples as well.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from dede_ray.data.images import decode_image, to_unit_range
from dede_ray.data.shards import Limits, iter_samples, list_shards, open_shard
from dede_ray.detectors.consistency import Consistency
from dede_ray.detectors.contract import everything_of
from dede_ray.models.embedding import Batch, in_one_heap
from dede_ray.models.victims import load_victim
from dede_ray.poisoning.triggers import Patch
from dede_ray.scan.calibration import FromCorpus, drawn_by_content, judge_by_itself
from dede_ray.scan.decisions import Conformal
from dede_ray.scan.judge import Judging, Scored, judge
from dede_ray.scan.pool import Company
from dede_ray.scan.reviews import Reviews

TARGET = 5
NETWORKS = {"victim": "wrn16-1_cifar10_backdoor_grid_target5_nad.pth.tar", "reference": "resnet20_cifar10.th"}
SCORES = ("xc_misplaced", "company")
SETTINGS = FromCorpus(from_corpus=2500)
PLAIN = Judging(shift=None, grouping=None)
JUDGING = PLAIN.model_copy(update={"company": Company(of="xc_misplaced", residual="xc_residual")})


def embedded(data: Path, cache: Path | None = None) -> dict[str, np.ndarray]:
    """What both networks say of the test images, clean and triggered, and the labels; or what an earlier call kept."""
    if cache is not None and cache.is_file():
        return dict(np.load(cache))
    [shard] = list_shards(str(data / "cifar10" / "test-00000.tar.gz"))
    with open_shard(shard) as stream:
        samples = [(decode_image(one.image or b"", Limits(), 32), one.label) for one in iter_samples(stream, Limits())]
    clean_NHWC, grid = np.stack([image for image, _ in samples]), Patch(size_px=3, pattern="grid")
    kinds = {"clean": clean_NHWC, "triggered": np.stack([grid.stamp(image) for image in clean_NHWC])}
    found = {"label": np.array([label for _, label in samples])}
    for role, file in NETWORKS.items():
        network = load_victim({"kind": "published", "path": str(data / "weights" / file)})
        for kind, image_NHWC in kinds.items():
            starts = range(0, len(image_NHWC), 500)
            parts = [network(to_unit_range(torch.from_numpy(image_NHWC[i : i + 500]))) for i in starts]
            found[f"{role}_{kind}"] = torch.cat(parts).numpy()
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache, **found)
    return found


def corpus_of(seen: dict[str, np.ndarray], seed: int, strength: float, num: int, num_poisoned: int) -> Scored:
    """A scored corpus; the ids of poisoned samples begin with p."""
    order = np.random.default_rng(seed).permutation(len(seen["label"]))
    clean, rest = np.split(order, [num - num_poisoned])
    poisoned = rest[seen["label"][rest] != TARGET][:num_poisoned]
    victim, reference = (
        torch.from_numpy(np.concatenate([plain[clean], plain[poisoned] + strength * (stamped - plain)[poisoned]]))
        for plain, stamped in ((seen[f"{role}_clean"], seen[f"{role}_triggered"]) for role in NETWORKS)
    )
    ids = [f"c/{row}" for row in clean] + [f"p/{row}" for row in poisoned]
    batch, detector = Batch(ids, victim, reference_BR=reference), Consistency(min_agreement=0.1)
    network: Any = SimpleNamespace(embedding_dim=victim.shape[1], device=torch.device("cpu"), name="victim")
    scorer = detector.open(network, detector.fit(in_one_heap(batch), None))
    parts = [everything_of(scorer, batch.part(range(i, min(i + 512, num)))) for i in range(0, num, 512)]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    residuals = {name: columns.pop(name) for name in [*columns] if columns[name].ndim == 2}
    floats = {name: column.astype(np.float64) for name, column in columns.items()}
    return Scored(ids, ids, [None] * num, [None] * num, floats, [], None, residuals=residuals)


def one_draw(corpus: Scored, score: str) -> dict[str, float]:
    """What each way finds of one corpus."""
    ids, decision = corpus.sample_ids, Conformal(score=score)
    is_poisoned = np.array([name.startswith("p") for name in ids])
    is_drawn = drawn_by_content(ids, SETTINGS.from_corpus, SETTINGS.seed)

    def after(looks: dict[str, bool]) -> Any:
        said = {name: "poisoned" if yes else "clean" for name, yes in looks.items()}
        return judge_by_itself(JUDGING, decision, corpus, SETTINGS, Reviews(said), [], False)  # type: ignore[arg-type]

    def rates(flagged: np.ndarray, among: np.ndarray) -> tuple[float, float]:
        on_list = flagged & among
        return float(on_list[is_poisoned & among].mean()), float((on_list & ~is_poisoned).sum() / max(1, on_list.sum()))

    truth = dict(zip(ids, is_poisoned.tolist(), strict=True))
    nobody = after({})
    to_look = [row["sample_id"] for row in nobody.to_review if row["why"] == "calibration"]
    looks = {name: truth[name] for name in to_look}
    wrong = [name for name in to_look if not truth[name]][:10]
    trimmed = after(looks)
    verified = after({name: truth[name] for name, drawn in zip(ids, is_drawn, strict=True) if drawn})
    assert (nobody.report["mode"], trimmed.report["mode"], verified.report["mode"]) == (
        "ranked",
        "trimmed",
        "certified",
    )
    made = Scored(ids, ids, corpus.captions, corpus.perceptual_hash, {score: nobody.score_N}, [], None)
    blind = np.zeros(len(ids), bool)
    blind[~is_drawn] = judge(PLAIN, decision, made.part(~is_drawn), made.part(is_drawn), [], False).verdict.flagged
    found: dict[str, float] = {"struck": trimmed.report["calibration"]["struck"]}
    for name, flagged, among in (
        ("verified", verified.verdict.flagged, ~is_drawn), ("trimmed", trimmed.verdict.flagged, ~is_drawn),
        ("blind", blind, ~is_drawn), ("null", nobody.verdict.flagged, np.ones(len(ids), bool)),
    ):  # fmt: skip
        found[name], found[f"{name}_fdp"] = rates(flagged, among)
    found["warned"] = bool(trimmed.report["calibration"]["warnings"])
    found["warned_of_wrong"] = bool(after(looks | dict.fromkeys(wrong, True)).report["calibration"]["warnings"])
    return found


def measure(seen: dict[str, np.ndarray], num_draws: int, strengths: tuple[float, ...]) -> Iterator[dict[str, Any]]:
    """Means over draws, and standard errors of the trimmed lists' false discovery proportion."""
    for strength in strengths:
        corpora = [corpus_of(seen, seed, strength, 5000, 50) for seed in range(num_draws)]
        for score in SCORES:
            found = [one_draw(corpus, score) for corpus in corpora]
            means = {name: round(float(np.mean([one[name] for one in found])), 3) for name in found[0]}
            error = float(np.std([one["trimmed_fdp"] for one in found]) / np.sqrt(num_draws))
            yield {"score": score, "strength": strength, **means, "trimmed_fdp_error": round(error, 3)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for row in measure(embedded(Path(sys.argv[1]), Path(sys.argv[2])), 20, (1.0, 0.6, 0.4)):
        print(row, flush=True)

"""Seed and amplify over shards: what the surest samples of a manifest share is looked for in the whole corpus.

seed_classifier.py has the idea, the classifier and its control; here a round is passes over shards (passes.py), as
resumable as scoring. The seeds are the manifest's flagged samples, or its top ones. A round looks where the victim
looks in them, fits networks on windows of these places pasted into clean pictures, scores calibration samples and
corpus with them, and decides; what is flagged are the next round's seeds.

    <output>/clean/               pictures that windows are pasted into
    <output>/round-1/seeds/       pictures of the seeds, and maps of where the victim looks
    <output>/round-1/amplified.*  the networks, and how they did in the control
    <output>/round-1/calibration/, scores/   parts with the column `amplified`
    <output>/amplify.json         what it was made of, and what came of every round
    <output>/manifest*, flagged.txt   a manifest as scoring writes it, with one score column more
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import Field

from dede_ray.data.identity import identified, shard_entry
from dede_ray.data.images import to_unit_range
from dede_ray.data.ledger import Chosen, KeyedShare, PassSummary, Select, read_parts
from dede_ray.data.passes import PassResources, run_pass
from dede_ray.data.sampling import keyed_generator
from dede_ray.data.shards import Shard, count_samples, list_shards
from dede_ray.data.workers import Chunk, Work
from dede_ray.models.victims import VictimConfig, best_device, load_victim
from dede_ray.runtime.config import Mistake, claim, finish, read_json, write_json
from dede_ray.runtime.lease import leased
from dede_ray.runtime.session import start_ray
from dede_ray.scan.decisions import Verdict
from dede_ray.scan.groups import copies
from dede_ray.scan.judge import Judging, Scored, judge
from dede_ray.scan.manifest import DECISION_COLUMNS, Manifest, read_manifest, require_made_of, write_manifest
from dede_ray.scan.overlap import pictures as named_pictures
from dede_ray.scan.overlap import refuse_common
from dede_ray.scan.score import hash_of_ids, settings_of, versions, victim_of
from dede_ray.scan.seed_classifier import (
    COLUMN,
    DESCRIPTION_FILE,
    LEAST_SEEDS,
    WEIGHTS_FILE,
    Amplification,
    Amplified,
    Amplify,
    Images,
    Rounds,
    choose_seeds,
    in_rounds,
    load_amplified,
    occlusion_map,
)

logger = logging.getLogger(__name__)

WHOLE = (
    "the classifier compared whole pictures: that it passed its control shows that the seeds share something in "
    "their pixels, which may be a trigger and may be a subject or a source, not that there is a backdoor"
)


class AmplifyConfig(Rounds):
    """Settings of jobs/amplify.py."""

    manifest: str
    """Folder that jobs/score.py wrote; its victim, limits and samples are this job's."""
    shards: str | list[str] | None = None
    """The shards that were scored, all of them; None takes the manifest's."""
    clean: str | list[str] | None = None
    """Verified clean shards that windows of the seeds are pasted into, of the corpus's own kind; needed. Not those of
    the calibration."""
    calibration: str | list[str] | None = None
    """Clean shards that nothing was fitted on, for p-values; None takes the manifest's."""
    output: str
    amplify: Amplify = Amplify()
    max_seeds: int = Field(2000, ge=LEAST_SEEDS)
    """Distinct seeds to use, at most, drawn by their keys. They are held in memory, with their maps."""
    max_clean: int = Field(5000, ge=LEAST_SEEDS)
    """About so many clean pictures are drawn, and held in memory."""
    chunk_size: int = Field(256, ge=1)
    """Samples that are scored, written and recovered together."""
    full_digest: bool = False
    """Know shards again by all of their bytes, which are read for it, and not by some."""
    max_error_fraction: float = Field(0.1, ge=0, le=1)
    """Stop when more than this share of the samples cannot be used."""
    resources: PassResources = PassResources()


def amplify_manifest(config: AmplifyConfig) -> str:
    """Amplify a manifest's seeds and write a manifest of what they find.

    A rerun does what remains. Samples that the first manifest could not score are not scored here either.

    Returns:
        One line: how many were flagged, from how many seeds, and how the control went. A second one says what the
        decision promises.

    Raises:
        Mistake: too few seeds, no clean or no calibration shards, other shards or another victim than the manifest's,
            or an output folder of another run.
    """
    start_ray(config)
    run = _Run(config)
    with leased(run.output):
        return _amplify(config, run)


def _amplify(config: AmplifyConfig, run: _Run) -> str:
    settings = config.model_copy(update={"resources": PassResources()})  # which may change where a run is continued
    done = claim(run.output, settings, places=("manifest", "shards", "clean", "calibration"))
    made_of = run.claim_inputs()
    if done:
        return done["summary"]
    found = in_rounds(config, run.seeds, run.fit, run.rescore, run.next_seeds)
    manifest = run.write(found)
    last = [one for one in found.rounds if one["passes"]][-1:] or found.rounds[:1]
    write_json(run.output / "amplify.json", {**made_of, "rounds": found.rounds, "caveat": _caveat(found.amplified)})
    counts, failed = manifest.info["counts"], "" if last[0]["passes"] else "; it failed"
    summary = (
        f"{counts['flagged']:,} of {counts['scored']:,} samples flagged from {len(run.seeds):,} seeds, rounds: "
        f"{len(found.rounds)} ({last[0]['way']}, AUROC of the control {last[0]['control_auroc']:.3f}, "
        f"bar {last[0]['bar']:.3g}{failed}) -> {config.output}\n{manifest.info['decision']['message']}"
    )
    finish(run.output, settings, {"rounds": found.rounds, "summary": summary})
    return summary


class _Run:
    """One run of the job: the manifest and all shards checked, the seeds chosen, and what `in_rounds` asks for."""

    def __init__(self, config: AmplifyConfig):
        self.config, self.output = config, Path(config.output).absolute()
        self.manifest = read_manifest(config.manifest)
        if self.output == self.manifest.folder:
            raise Mistake(f"output {config.output} is the folder of the manifest itself; choose another one")
        self.scored = settings_of(self.manifest)
        self.victim = victim_of(self.manifest)
        self.shards, self.clean, self.calibration = self._shards()
        table = self.manifest.table
        self.sample_ids: list[str] = table["sample_id"].to_pylist()
        self.hashes: list[str] = table["content_hash"].to_pylist()
        self.is_scored = table["error"].is_null().to_numpy()
        self.seeds = self._first_seeds()

    def _shards(self) -> tuple[list[Shard], list[Shard], list[Shard]]:
        """Corpus, clean and calibration shards."""
        config = self.config
        names = config.shards or self.scored.shards
        if not names:
            raise Mistake("the manifest was scored from stored embeddings; name the `shards` with its pictures")
        if config.clean is None:
            raise Mistake(
                "amplify pastes windows of the seeds into clean pictures, and none are named; set `clean` to shards of "
                "verified clean samples of the corpus's own kind, others than those of the calibration"
            )
        calibration_names = config.calibration or self.scored.calibration
        if not calibration_names:
            raise Mistake(
                "amplify calibrates its scores on clean samples, and the manifest was made without any; set "
                "`calibration` to clean shards, others than `clean`"
            )
        shards, clean, calibration = (
            identified(list_shards(one), config.full_digest) for one in (names, config.clean, calibration_names)
        )
        given, scored = {shard.name for shard in shards}, set(self.manifest.info["shards"])
        if given != scored:
            raise Mistake(
                f"the manifest at {self.manifest.folder} is one of other shards, such as "
                f"{min(given ^ scored)}; name exactly the shards that were scored"
            )
        self.manifest.require_same_shards(shards)
        for role, others in (("shards", shards), ("calibration", calibration)):
            contents = {(shard.num_bytes, shard.digest) for shard in others}
            if both := [shard for shard in clean if (shard.num_bytes, shard.digest) in contents]:
                raise Mistake(
                    f"{both[0].url} is named as `clean` and as `{role}`; clean pictures that networks are fitted on "
                    "can be neither, so split the clean shards"
                )
        return shards, clean, calibration

    def claim_inputs(self) -> dict[str, Any]:
        """Record what the output is made of, and stop if the folder was made of something else."""
        roles = {"shards": self.shards, "clean": self.clean, "calibration": self.calibration}
        made_of: dict[str, Any] = {
            "manifest": {"path": self.config.manifest, "fingerprint": self.manifest.fingerprint()},
            **{role: {shard.name: shard_entry(shard) for shard in shards} for role, shards in roles.items()},
        }
        path = self.output / "amplify.json"
        if path.is_file():
            require_made_of(read_json(path, "record of an amplification"), made_of, roles, self.output)
        if not path.is_file():
            write_json(path, made_of)
        return made_of

    # ------------------------------------------------------------------------------------------------ seeds

    def _first_seeds(self) -> NDArray[np.intp]:
        """What the manifest flags or, where that is too little, what scores highest; no picture twice."""
        table = self.manifest.table
        score_N = table[self.manifest.info["decision"]["score"]].to_numpy(zero_copy_only=False).astype(np.float64)
        score_N[~self.is_scored] = np.nan
        best_first = np.lexsort((np.array(self.sample_ids, object), -score_N))  # NaN last
        lone_N = np.full(len(score_N), np.nan)
        lone = self._distinct(best_first)
        lone_N[lone] = score_N[lone]
        flagged_N = np.zeros(len(score_N), bool)
        flagged_N[self._distinct(np.flatnonzero(table["flagged"].fill_null(False).to_numpy()))] = True
        seeds = self._drawn(choose_seeds(lone_N, flagged_N, self.sample_ids))
        if len(seeds) < LEAST_SEEDS:
            raise Mistake(
                f"the manifest at {self.manifest.folder} has {len(seeds)} distinct samples with a score, and it takes "
                f"{LEAST_SEEDS} seeds; there is nothing to amplify"
            )
        return seeds

    def next_seeds(self, flagged_N: NDArray[np.bool_]) -> NDArray[np.intp]:
        """The flagged, no picture twice, or a draw of them."""
        return self._drawn(self._distinct(np.flatnonzero(flagged_N)))

    def _distinct(self, places: NDArray[np.intp]) -> NDArray[np.intp]:
        """The first of each picture: hundreds of copies among the seeds would be all that is learnt."""
        first: dict[str, int] = {}
        for place in places.tolist():
            first.setdefault(self.hashes[place], place)
        return np.array(sorted(first.values()), np.intp)

    def _drawn(self, places: NDArray[np.intp]) -> NDArray[np.intp]:
        if len(places) <= self.config.max_seeds:
            return places
        seed = self.config.amplify.seed
        keys = [keyed_generator(seed, self.sample_ids[place]).random() for place in places.tolist()]
        return np.sort(places[np.argsort(keys, kind="stable")[: self.config.max_seeds]])

    # ------------------------------------------------------------------------------------------------ a round

    def fit(self, number: int, seeds: NDArray[np.intp]) -> Amplified:
        """Fit the networks of a round, or load them if an earlier run did."""
        folder = self.output / f"round-{number}"
        if (folder / DESCRIPTION_FILE).is_file():  # it is written after the weights
            return load_amplified(folder)
        chosen = {self.sample_ids[place]: self.hashes[place] for place in seeds.tolist()}
        theirs = {name.partition("/")[0] for name in chosen}
        wants_maps = self.config.amplify.look_at != "whole"
        seen, pictures, maps = self._pictures(
            folder / "seeds", [shard for shard in self.shards if shard.name in theirs], Chosen(frozenset(chosen)),
            {"chosen": hash_of_ids(sorted(chosen))}, wants_maps, f"round {number}, seeds",
        )  # fmt: skip
        if seen != chosen:
            self._complain(seen, chosen)
        share = KeyedShare(min(1.0, self.config.max_clean / max(1, count_samples(self.clean))), 0)
        seen, clean, _ = self._pictures(
            self.output / "clean", self.clean, share, {"share": share.share}, False, "clean pictures"
        )
        refuse_common({"shards": named_pictures(self.hashes), "clean": named_pictures(seen.values())}, "refuse")
        amplified = self.config.amplify.fit(pictures, maps, clean)
        amplified.save(folder)
        return amplified

    def _pictures(
        self, folder: Path, shards: list[Shard], select: Select, made_with: dict[str, Any], wants_maps: bool, name: str
    ) -> tuple[dict[str, str], Images, NDArray[np.float32] | None]:
        """Selected pictures, as ids and content hashes, pixels and maps, in the order of the shards."""
        size = self.victim.image_size
        victim = self.scored.victim.located() if wants_maps else None
        made_with = {**made_with, "victim": victim and self.victim.fingerprint}
        self._pass(shards, folder, LookWork, {"victim": victim, "image_size": size}, made_with, name, select)
        table = pa.concat_tables([read_parts(folder, shard.name) for shard in shards])
        table = table.filter(table["error"].is_null())
        seen = dict(zip(table["sample_id"].to_pylist(), table["content_hash"].to_pylist(), strict=True))
        maps = _array(table["map"]).reshape(-1, size, size) if wants_maps else None
        return seen, _array(table["picture"]).reshape(-1, size, size, 3), maps

    def rescore(self, number: int, amplified: Amplified) -> tuple[NDArray[np.floating], Verdict]:
        """Score calibration samples and corpus with the networks of a round, and decide."""
        folder = self.output / f"round-{number}"
        weights = hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()
        for name, shards in (("calibration", self.calibration), ("scores", self.shards)):
            self.summary = self._pass(
                shards, folder / name, AmplifyWork, {"folder": str(folder)},
                {"amplified": weights, "versions": versions()}, f"round {number}, {name}",
            )  # fmt: skip
        calibration = _read_scored(folder / "calibration", [shard.name for shard in self.calibration])
        corpus = _read_scored(folder / "scores", self.manifest.info["shards"])
        seen = dict(zip(corpus.sample_ids, corpus.content_hash, strict=True))
        if [*seen] != self.sample_ids or [*seen.values()] != self.hashes:
            self._complain(seen, dict(zip(self.sample_ids, self.hashes, strict=True)))
        corpus.columns[COLUMN][~self.is_scored] = np.nan
        judging = Judging(shift=None, grouping=None)
        verdict = judge(judging, self.config.decision, corpus, calibration, [], looks_at_captions=False).verdict
        verdict = self._shifted(verdict)
        logger.info("round %d: %s samples flagged", number, f"{int(verdict.flagged.sum()):,}")
        return corpus.columns[COLUMN], verdict

    def _shifted(self, verdict: Verdict) -> Verdict:
        """The manifest's own look at domain shift holds where the calibration samples are the same."""
        shift = None if self.config.calibration else self.manifest.info["decision"].get("shift")
        verdict.report["shift"] = shift
        if shift and shift["value"] is not None and shift["value"] > shift["limit"]:
            return verdict.refused(
                f"cannot certify: {shift['said']}; choose clean samples from where the corpus is from"
            )
        return verdict

    def _pass(
        self,
        shards: list[Shard],
        folder: Path,
        work: type[Work],
        arguments: dict[str, Any],
        made_with: dict[str, Any],
        name: str,
        select: Select | None = None,
    ) -> PassSummary:
        config = self.config
        return run_pass(
            shards, folder, work, arguments, image_size=self.victim.image_size, made_with=made_with,
            chunk_size=config.chunk_size, limits=self.scored.limits, resources=config.resources,
            max_error_fraction=config.max_error_fraction, name=name, select=select,
        )  # fmt: skip

    def _complain(self, seen: dict[str, Any], expected: dict[str, Any]) -> None:
        names = sorted(name for name in seen.keys() | expected.keys() if seen.get(name) != expected.get(name))
        where = names[0] if names else "their order"
        raise Mistake(
            f"the shards are not those of the manifest at {self.manifest.folder}: {where} differs; name the shards "
            "that were scored, or score these"
        )

    # ------------------------------------------------------------------------------------------------ the manifest

    def write(self, found: Amplification) -> Manifest:
        """The manifest's rows with the new column, judged by it."""
        source, table, verdict = self.manifest, self.manifest.table, found.verdict
        dropped = {COLUMN, "error", *(name for name, _ in DECISION_COLUMNS)}
        base = table.select([name for name in table.column_names if name not in dropped])
        is_missing = np.isnan(found.scores)
        errors = [
            error or ("not_finite" if missing else None)
            for error, missing in zip(table["error"].to_pylist(), is_missing.tolist(), strict=True)
        ]
        base = base.append_column(
            pa.field(COLUMN, pa.float32()), pa.array(found.scores, pa.float32(), from_pandas=True)
        )
        values = (
            found.scores, verdict.p_value, verdict.rank, verdict.poisoned_at_least, verdict.flagged,
            copies(self.hashes),
        )  # fmt: skip
        for (name, kind), value in zip(DECISION_COLUMNS, values, strict=True):
            base = base.append_column(pa.field(name, kind), pa.array(value, kind, from_pandas=True))
        base = base.append_column(pa.field("error", pa.string()), pa.array(errors, pa.string()))
        num_rows = Counter(table["shard"].to_pylist())

        def rows() -> Iterator[tuple[str, pa.Table]]:
            start = 0
            for shard in source.info["shards"]:
                yield shard, base.slice(start, num_rows[shard])
                start += num_rows[shard]

        report = dict(verdict.report)
        if caveat := _caveat(found.amplified):
            report["message"] += f"; {caveat}"
        unreadable = dict(sorted(Counter(error for error in errors if error).items()))
        kept = ("settings", "victim", "reference", "detectors", "second_stage_columns", "controls")
        info = {
            **{name: source.info[name] for name in kept if name in source.info},
            "versions": versions(),
            "score_columns": [*(name for name in source.score_columns if name != COLUMN), COLUMN],
            "amplified": {
                "settings": self.config.model_dump(mode="json", exclude={"resources"}),
                "manifest": source.fingerprint(),
                "rounds": found.rounds,
            },
            "decision": report,
            "counts": {
                "samples": len(errors),
                "scored": len(errors) - sum(unreadable.values()),
                "unreadable": unreadable,
                "flagged": int(verdict.flagged.sum()),
                "truncated_shards": self.summary.truncated_shards,
                "duplicated_images": sum(name is not None for name in copies(self.hashes)),
            },
        }
        return write_manifest(self.output, rows(), info)


def _caveat(amplified: Amplified) -> str | None:
    return WHOLE if amplified.way == "whole" and amplified.passes else None


def _array(column: pa.ChunkedArray) -> NDArray[Any]:
    """A column of lists without nulls as one flat array."""
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate(chunks) if chunks else np.empty(0, column.type.value_type.to_pandas_dtype())


def _read_scored(folder: Path, shards: Sequence[str]) -> Scored:
    """What a pass with the networks wrote, in the order of a manifest."""
    columns = ["sample_id", "content_hash", COLUMN]
    table = pa.concat_tables([read_parts(folder, name, columns).sort_by("sample_id") for name in shards])
    nothing: list[None] = [None] * len(table)
    return Scored(
        sample_ids=table["sample_id"].to_pylist(),
        content_hash=table["content_hash"].to_pylist(),
        captions=nothing,
        perceptual_hash=nothing,
        columns={COLUMN: table[COLUMN].to_numpy(zero_copy_only=False).astype(np.float64)},
        embedding_ids=[],
        embedding_ME=None,
    )


# ------------------------------------------------------------------------------------------------ on the actors


class LookWork:
    """Keeps pictures and, given the victim, maps of where it looks."""

    def __init__(self, victim: VictimConfig | None, image_size: int):
        self.image_size = image_size
        self.device = best_device()
        self.victim = load_victim(victim).to(self.device) if victim else None
        self.columns: dict[str, pa.DataType] = {"picture": pa.list_(pa.uint8(), 3 * image_size**2)}
        if self.victim is not None:
            self.columns["map"] = pa.list_(pa.float32(), image_size**2)

    def __call__(self, chunk: Chunk) -> dict[str, Any]:
        num = len(chunk.sample_ids)
        columns = {"picture": [*chunk.image_BHWC.reshape(num, -1)]}
        if self.victim is not None:
            image_BCHW = to_unit_range(torch.tensor(chunk.image_BHWC).to(self.device))
            columns["map"] = [*occlusion_map(self.victim, image_BCHW).cpu().numpy().reshape(num, -1)]
        return columns


class AmplifyWork:
    """Scores pictures with the networks of a round."""

    def __init__(self, folder: str):
        self.amplified = load_amplified(folder).to(best_device())
        self.image_size = self.amplified.image_size
        self.columns: dict[str, pa.DataType] = {COLUMN: pa.float32()}

    def __call__(self, chunk: Chunk) -> dict[str, Any]:
        return {COLUMN: self.amplified.score(chunk.image_BHWC)}

"""Groups of suspicious samples: what they share, and whether that acts in this encoder.

A list is read row by row; what a person can act on is a group: "60 samples, caption 'zero', one patch in a corner, and
put on 100 clean pictures it moves 97 of them to 'zero'". `find` makes groups of the flagged and of what comes next in
the ranking, by the direction in which the encoder was led astray (the residual; without one the embedding) and by
caption, and asks of each:

    bound       how many of them are poisoned at least, from the bounds of all prefixes of the ranking
    words       which words their captions have more often than the corpus's
    shared      which pixels they share, and whether clean pictures share as much (effect.py)
    effect      whether these pixels move clean pictures of the same corpus in this encoder (effect.py)

Two verdicts: *manipulated*, some of it is certified poison or shares pixels as clean pictures do not, which an honest
encoder's group may do as well; and *acts in this encoder*, which is the backdoor at work. Findings change no list.

    <output>/findings.json       {"groups": [...], "findings": [...]}: these, and copies and clumps (groups.py)
    <output>/findings/<name>/    pictures of a group: medoids, shared, trigger, clean, stamped (PNG)
    <output>/findings/made_with.json  what groups were made with: equal inputs are not tested again
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.stats import hypergeom

from dede_ray.data.images import decode_image, encode_image, to_unit_range
from dede_ray.data.ledger import read_parts
from dede_ray.data.sampling import keyed_generator, sample_keys
from dede_ray.data.shards import BadSample, Limits, Sample, Shard, iter_samples, open_shard, sample_id
from dede_ray.models.embedding import matrix
from dede_ray.models.victims import ClipVictim, Victim, VictimConfig, best_device, load_victim
from dede_ray.runtime.config import Config, Mistake, parse_json, read_json, write_json
from dede_ray.runtime.store import Place, write_atomically
from dede_ray.scan.decisions import Verdict
from dede_ray.scan.effect import (
    EffectTest,
    Images,
    Pictures,
    Shared,
    Tested,
    Trigger,
    agreement,
    described,
    holm,
)
from dede_ray.scan.judge import Scored
from dede_ray.scan.pool import Looks

logger = logging.getLogger(__name__)

Rows = NDArray[np.floating]

MOST_CANDIDATES = 4000
"""Samples that are grouped; the highest of a longer list."""
MOST_EMBEDDED = 1000
"""Those of them where they have to be embedded for it."""
MOST_COUNTED = 100_000
"""Captions in which words are counted; a keyed draw of more."""
MOST_ALIKE = 60
FEW_BYTES = 64_000_000
"""Shards that are together no larger are read by one process."""


class Findings(Config):
    """Which groups there are, and how far they are looked into."""

    near_misses: float = Field(1.0, ge=0)
    """Samples below the cut that are grouped as well, as a multiple of the flagged; 50 in any case, and a tenth of the
    corpus at most."""
    min_cosine: float = Field(0.5, gt=0, lt=1)
    """Cosine of a member's residual to its group's mean."""
    min_size: int = Field(5, ge=2)
    """Distinct pictures that make a group."""
    max_groups: int = Field(8, ge=1)
    max_tested: int = Field(4, ge=1)
    """Groups that are tested: those with most flagged samples, then the largest."""
    num_members: int = Field(100, ge=5)
    """Members of a group whose pictures are compared, the highest of them."""
    effect: EffectTest | None = EffectTest()
    """Put what a group shares on clean pictures, and see whether they move; None looks at no picture."""
    seed: int = 0
    """Draws clean pictures and controls."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """Samples that may be grouped, in the order of their ranks."""

    sample_ids: Sequence[str]
    flagged: NDArray[np.bool_]
    rank: NDArray[np.int64]
    captions: Sequence[str | None]
    looks: Looks
    residual_NR: Rows
    """NaN where a sample has none."""

    def __len__(self) -> int:
        return len(self.sample_ids)


@dataclass(frozen=True, eq=False)
class Group:
    """Rows of the candidates, in their order."""

    kind: Literal["direction", "caption"]
    rows: NDArray[np.int64]


# ------------------------------------------------------------------------------------------------ grouping


def choose(verdict: Verdict, sample_ids: Sequence[str], settings: Findings) -> NDArray[np.int64]:
    """Rows of the flagged and of those next in the ranking, by rank; equal ones by id."""
    ranked = np.flatnonzero(verdict.rank > 0)
    ids = np.array(sample_ids, dtype=object)[ranked]
    ranked = ranked[np.lexsort((ids, verdict.rank[ranked], ~verdict.flagged[ranked]))]
    num_flagged = int(verdict.flagged.sum())
    num_near = min(max(50, round(settings.near_misses * num_flagged)), math.ceil(0.1 * ranked.size))
    return ranked[: min(num_flagged + num_near, MOST_CANDIDATES)]


def grouped(candidates: Candidates, settings: Findings, words: Words) -> list[Group]:
    """Groups by direction, the densest first, then by caption; a sample is in one at most.

    The mode of what is left is where most distinct pictures are within `min_cosine`; a group is what is within that of
    its own mean. Pictures that are copies, or nearly, count once. No order of the samples changes anything.
    """
    residual_NR = np.asarray(candidates.residual_NR, np.float64)
    length_N = np.linalg.norm(residual_NR, axis=1)
    usable = np.isfinite(length_N) & (length_N > 0)
    unit_NR = np.zeros_like(residual_NR)
    unit_NR[usable] = residual_NR[usable] / length_N[usable, None]
    copy_N = candidates.looks.groups()
    near_NN = (unit_NR @ unit_NR.T).astype(np.float32) >= settings.min_cosine
    free_N, found = usable.copy(), list[Group]()
    while len(found) < settings.max_groups and free_N.any():
        rows = np.flatnonzero(free_N)
        leaders = np.intersect1d(rows, copy_N[rows])
        density_N = near_NN[np.ix_(rows, leaders)].sum(axis=1)
        seed = rows[int(np.argmax(density_N))]
        if density_N.max() < settings.min_size:
            break
        centre_R = unit_NR[rows[near_NN[seed, rows]]].mean(axis=0)
        for _ in range(10):
            inside = rows[unit_NR[rows] @ centre_R >= settings.min_cosine * np.linalg.norm(centre_R)]
            if not inside.size:
                break
            centre_R = unit_NR[inside].mean(axis=0)
        if np.unique(copy_N[inside]).size < settings.min_size:
            free_N[seed] = False
            continue
        free_N[inside] = False
        found.append(Group("direction", inside))
    free_N = candidates.flagged & ~np.isin(np.arange(len(candidates)), [row for one in found for row in one.rows])
    while len(found) < settings.max_groups:
        rows = np.flatnonzero(free_N)
        telling = words.telling([candidates.captions[row] for row in rows.tolist()], 1e-6, 0)
        groups = [rows[[words.has(candidates.captions[row], one["word"]) for row in rows.tolist()]] for one in telling]
        groups = [one for one in groups if np.unique(copy_N[one]).size >= settings.min_size]
        if not groups:
            break
        free_N[groups[0]] = False
        found.append(Group("caption", groups[0]))
    return found


def poisoned_at_least(members: NDArray[np.int64], verdict: Verdict) -> int:
    """How many distinct samples of a set are poisoned at least, whoever chose it and why.

    Of the first samples at least L are poisoned, and those of them that are outside the set can be no more than all.
    The bounds hold for all prefixes at once, so this one holds for all sets (Goeman & Solari, Stat. Sci. 2011).
    """
    ranks, first = np.unique(verdict.rank[verdict.rank > 0], return_index=True)
    bound = verdict.poisoned_at_least[verdict.rank > 0][first]
    inside = np.isin(ranks, verdict.rank[members])
    return max(0, int((bound - np.cumsum(~inside)).max(initial=0)))


class Words:
    """How many captions of the corpus have a word."""

    def __init__(self, captions: Iterable[str | None]):
        self.counts, self.num = Counter[str](), 0
        for caption in captions:
            self.num += 1
            self.counts.update(words_of(caption))

    @staticmethod
    def has(caption: str | None, word: str) -> bool:
        return word in words_of(caption)

    def telling(
        self, captions: Sequence[str | None], level: float = 0.01, least_share: float = 0.3
    ) -> list[dict[str, Any]]:
        """Words that are in more of these captions than chance would have it, the most telling first."""
        counts = Counter(word for caption in captions for word in words_of(caption))
        found = []
        for word, count in counts.items():
            of_corpus = max(self.counts[word], count)
            chance = hypergeom.sf(count - 1, max(self.num, len(captions)), of_corpus, len(captions))
            if count >= least_share * len(captions) and chance * len(counts) <= level:
                found.append((float(hypergeom.logsf(count - 1, self.num, of_corpus, len(captions))), -count, word))
        return [
            {"word": word, "in_group": -count, "in_corpus": self.counts[word]} for _, count, word in sorted(found)[:5]
        ]


def words_of(caption: str | None) -> set[str]:
    return set(re.findall(r"\w+", caption.casefold()[:1000])) if caption else set()


# ------------------------------------------------------------------------------------------------ pictures


@dataclass(frozen=True, eq=False)
class Seen:
    """A sample's picture at the encoder's size, and the host that it came from."""

    image_HWC: Images
    host: str | None


def look(shards: Sequence[Shard], wanted: Iterable[str], size_px: int, limits: Limits) -> dict[str, Seen]:
    """Read some samples' pictures from their shards; what cannot be read is left out."""
    by_shard: dict[str, set[str]] = {}
    for name in wanted:
        by_shard.setdefault(name.partition("/")[0], set()).add(name)
    jobs = [(shard, by_shard[shard.name], size_px, limits) for shard in shards if shard.name in by_shard]
    if sum(shard.num_bytes for shard, *_ in jobs) <= FEW_BYTES:
        found = [_look(*job) for job in jobs]
    else:
        import ray

        found = ray.get([ray.remote(num_cpus=1)(_look).remote(*job) for job in jobs])
    return {name: seen for part in found for name, seen in part.items()}


def _look(shard: Shard, wanted: set[str], size_px: int, limits: Limits) -> dict[str, Seen]:
    found: dict[str, Seen] = {}
    left = set(wanted)
    with open_shard(shard) as stream:
        for sample in iter_samples(stream, limits, keep_others=True):
            name = sample_id(shard.name, sample.key)
            if name not in left:
                continue
            left.discard(name)
            if sample.error is None and sample.image is not None:
                with contextlib.suppress(BadSample):
                    found[name] = Seen(decode_image(sample.image, limits, size_px), _host(sample))
            if not left:
                break
    return found


def _host(sample: Sample) -> str | None:
    """The host in the url of a sample's JSON, as img2dataset writes it."""
    try:
        url = parse_json(io.BytesIO(sample.others["json"]))["url"]
        return urlsplit(url).hostname if isinstance(url, str) else None
    except (KeyError, TypeError, ValueError):
        return None


# ------------------------------------------------------------------------------------------------ the step


@dataclass(frozen=True, eq=False)
class Corpus:
    """What `find` knows of a corpus; all of one length and order but the shards."""

    shards: Sequence[Shard]
    limits: Limits
    scored: Scored
    verdict: Verdict
    parts: Place | None
    """Folder of the pass that wrote `residual`."""
    residual: str | None
    """Column of residuals; None goes by embeddings."""
    has_pictures: bool = True


def find(settings: Findings, output: Place, corpus: Corpus, victim_config: VictimConfig) -> list[dict[str, Any]]:
    """Make groups, look into them, and write their pictures; the groups, ready for JSON.

    Groups that an earlier run made of the same inputs are read and not tested again.
    """
    rows = choose(corpus.verdict, corpus.scored.sample_ids, settings)
    if not rows.size:
        return []
    residual_NR = _residuals(corpus, rows)
    folder = output / "findings"
    victim = load_victim(victim_config).to(best_device())
    made_with = _digest(settings, corpus, rows, residual_NR, victim)
    record = folder / "made_with.json"
    if record.is_file():
        try:
            earlier = read_json(record, "record of findings")
            if earlier.get("made_with") == made_with and isinstance(earlier.get("groups"), list):
                return earlier["groups"]
        except Mistake:
            pass
        record.unlink(missing_ok=True)
    groups = _Search(settings, corpus, rows, residual_NR, victim, folder).groups()
    write_json(record, {"made_with": made_with, "groups": groups})
    return groups


def _residuals(corpus: Corpus, rows: NDArray[np.int64]) -> Rows | None:
    """Residuals of some samples, as the pass wrote them; None where it wrote none."""
    if corpus.residual is None or corpus.parts is None:
        return None
    names = [corpus.scored.sample_ids[row] for row in rows.tolist()]
    of: dict[str, Rows] = {}
    wanted, theirs = set(names), {name.partition("/")[0] for name in names}
    for shard in corpus.shards:
        if shard.name in theirs:
            table = read_parts(corpus.parts, shard.name, ["sample_id", corpus.residual])
            for name, row in zip(table["sample_id"].to_pylist(), matrix(table[corpus.residual]).numpy(), strict=True):
                if name in wanted:
                    of[name] = row
    return np.stack([of[name] for name in names]) if names else np.zeros((0, 1), np.float32)


def _digest(
    settings: Findings, corpus: Corpus, rows: NDArray[np.int64], residual_NR: Rows | None, victim: Victim
) -> str:
    """Of all that groups depend on."""
    scored, verdict = corpus.scored, corpus.verdict
    digest = hashlib.sha256(json.dumps([2, settings.model_dump(mode="json"), victim.fingerprint]).encode())
    digest.update(repr([(one.name, one.num_bytes, one.digest) for one in corpus.shards]).encode())
    digest.update(repr([corpus.limits.model_dump(mode="json"), corpus.residual, corpus.has_pictures]).encode())
    digest.update(b"" if residual_NR is None else residual_NR.tobytes())
    for texts in (scored.sample_ids, scored.content_hash, scored.captions, scored.perceptual_hash):
        digest.update(repr(list(texts)).encode("utf-8", "surrogateescape"))
    for column in (rows, verdict.flagged, verdict.rank, verdict.poisoned_at_least):
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()


class _Search:
    """One search for groups."""

    def __init__(
        self,
        settings: Findings,
        corpus: Corpus,
        rows: NDArray[np.int64],
        residual_NR: Rows | None,
        victim: Victim,
        folder: Place,
    ):
        self.settings, self.corpus, self.rows, self.victim, self.folder = settings, corpus, rows, victim, folder
        self.scored, self.verdict = corpus.scored, corpus.verdict
        self.key_N = sample_keys(self.scored.sample_ids, settings.seed, 17).numpy()
        self.words = Words(self.scored.captions[row] for row in self._some(len(self.scored), MOST_COUNTED))
        self.clean_rows = self._clean_rows()
        self.seen: dict[str, Seen] = {}
        self.residual_NR = residual_NR

    def _some(self, num: int, most: int) -> list[int]:
        return range(num) if num <= most else np.sort(np.argsort(self.key_N, kind="stable")[:most]).tolist()  # type: ignore[return-value]

    def _clean_rows(self) -> NDArray[np.int64]:
        """Scored samples that are no candidates, in the order of their keys."""
        is_clean = self.verdict.rank > 0
        is_clean[self.rows] = False
        is_clean &= ~self.verdict.flagged
        order = np.argsort(self.key_N, kind="stable")
        return order[is_clean[order]]

    def _id(self, row: int) -> str:
        return self.scored.sample_ids[row]

    def _look(self, rows: Iterable[int]) -> None:
        wanted = {self._id(row) for row in rows} - self.seen.keys()
        if wanted and self.corpus.has_pictures:
            self.seen |= look(self.corpus.shards, wanted, self.victim.image_size, self.corpus.limits)

    def _images(self, rows: Iterable[int]) -> tuple[list[int], Images]:
        """Those rows that have a picture, and their pictures."""
        there = [row for row in rows if self._id(row) in self.seen]
        side = self.victim.image_size
        images = [self.seen[self._id(row)].image_HWC for row in there]
        return there, np.stack(images) if images else np.zeros((0, side, side, 3), np.uint8)

    def embed(self, images: Images) -> Rows:
        import torch

        tensor = torch.from_numpy(np.ascontiguousarray(images)).to(self.victim.device)
        return self.victim(to_unit_range(tensor)).cpu().numpy()

    # ------------------------------------------------------------------------------------------------ groups

    def groups(self) -> list[dict[str, Any]]:
        effect = self.settings.effect if self.corpus.has_pictures else None
        num_clean = effect.num_pictures if effect else 0
        clean_rows = self._distinct(self.clean_rows[: 2 * num_clean].tolist())[:num_clean]
        if self.residual_NR is None:
            self._look([*self.rows[:MOST_EMBEDDED].tolist(), *clean_rows])
            self.residual_NR = self._directions(clean_rows)
        candidates = self._candidates()
        found = grouped(candidates, self.settings, self.words)
        if not found:
            return []
        members = [self._distinct(self.rows[one.rows].tolist())[: self.settings.num_members] for one in found]
        telling = [self.words.telling([self.scored.captions[row] for row in rows]) for rows in members]
        alike = [self._alike(words, clean_rows) if effect else [] for words in telling]
        if effect:
            self._look([*clean_rows, *(row for rows in [*members, *alike] for row in rows)])
        clean_rows, clean = self._images(clean_rows)
        num_flagged = [int(candidates.flagged[one.rows].sum()) for one in found]
        order = sorted(range(len(found)), key=lambda at: (-num_flagged[at], -found[at].rows.size, at))
        chosen, tested = order[: self.settings.max_tested], list[Tested]()
        for number, (one, rows, others) in enumerate(zip(found, members, alike, strict=True)):
            why = "others are larger" if effect else "the scores are of stored embeddings, without pictures"
            done = Tested(Shared(None, 0.0, 1.0), why_not=why if self.settings.effect else "not asked for")
            if effect and number in chosen:
                pictures = Pictures(self._images(rows)[1], clean, self._images(others)[1])
                rng = keyed_generator(self.settings.seed, "\n".join(sorted(self._id(row) for row in rows)))
                done = effect.run(pictures, self.embed, len(chosen), rng)
            tested.append(done)
            logger.info("findings: group %d of %d, %s samples: done", number + 1, len(found), f"{one.rows.size:,}")
        for number in range(self.settings.max_groups if effect else 0):
            stale: list[Place] = [*(self.folder / f"group-{number + 1}").glob("*.png")]
            for path in stale:
                path.unlink(missing_ok=True)
        p_values, shared = [1.0] * len(found), [1.0] * len(found)
        outcomes = [tested[at].outcome for at in chosen]
        adjusted = holm([outcome.p_value if outcome else 1.0 for outcome in outcomes])
        for at, p_value, of_pixels in zip(
            chosen, adjusted, holm([tested[at].shared.p_value for at in chosen]), strict=True
        ):
            p_values[at], shared[at] = p_value, of_pixels
        written = list[dict[str, Any]]()
        for number, one in enumerate(found):
            about = _Described(self, one, members[number], tested[number], p_values[number], shared[number])
            written.append(about.json(f"group-{number + 1}", clean_rows))
            if effect:
                about.draw(self.folder / f"group-{number + 1}", clean)
        return written

    def _distinct(self, rows: list[int]) -> list[int]:
        """The first of each picture, copies and almost equal ones."""
        looks = self.scored.looks.part(np.array(rows, np.int64))
        first: dict[int, int] = {}
        for row, group in zip(rows, looks.groups().tolist(), strict=True):
            first.setdefault(group, row)
        return [*first.values()]

    def _directions(self, clean_rows: list[int]) -> Rows:
        """Embeddings of the candidates, seen from the mean of clean ones; NaN where there is no picture."""
        directions = np.full((self.rows.size, self.victim.embedding_dim), np.nan)
        there, images = self._images(self.rows[:MOST_EMBEDDED].tolist())
        _, clean = self._images(clean_rows)
        if not there:
            return directions
        embedded = [np.concatenate([self.embed(part[at : at + 128]) for at in range(0, len(part), 128)]) for part in (
            images, clean if len(clean) else images)]  # fmt: skip
        place = {row: number for number, row in enumerate(self.rows.tolist())}
        directions[[place[row] for row in there]] = embedded[0] - embedded[1].mean(axis=0)
        return directions

    def _candidates(self) -> Candidates:
        rows = self.rows.tolist()
        assert self.residual_NR is not None
        return Candidates(
            [self._id(row) for row in rows],
            self.verdict.flagged[self.rows],
            self.verdict.rank[self.rows],
            [self.scored.captions[row] for row in rows],
            self.scored.looks.part(self.rows),
            self.residual_NR,
        )

    def _alike(self, telling: list[dict[str, Any]], but: Sequence[int]) -> list[int]:
        """Clean samples that have the group's most telling word in their caption, of the lower half of the ranking:
        poison that was missed is in the upper one."""
        if not telling:
            return []
        word, found, taken = telling[0]["word"], list[int](), set(but)
        rank_N = self.verdict.rank[self.clean_rows]
        for row in self.clean_rows[rank_N >= np.median(rank_N)].tolist() if rank_N.size else ():
            if row not in taken and self.words.has(self.scored.captions[row], word):
                found.append(row)
                if len(found) == MOST_ALIKE:
                    break
        return self._distinct(found)


@dataclass(frozen=True, eq=False)
class _Described:
    """A group in words, numbers and pictures."""

    search: _Search
    group: Group
    members: list[int]
    """Rows of its distinct pictures, the highest first."""
    tested: Tested
    p_value: float
    shared_p: float

    def json(self, name: str, clean_rows: list[int]) -> dict[str, Any]:
        search, tested = self.search, self.tested
        scored, verdict = search.scored, search.verdict
        rows = search.rows[self.group.rows]
        flagged, near = rows[verdict.flagged[rows]], rows[~verdict.flagged[rows]]
        bound, settings = poisoned_at_least(rows, verdict), search.settings.effect or EffectTest()
        words = search.words.telling([scored.captions[row] for row in rows.tolist()])
        target = search.words.telling([scored.captions[clean_rows[at]] for at in tested.company]) if clean_rows else []
        captions = Counter(scored.captions[row] for row in rows.tolist() if scored.captions[row])
        hosts = Counter(search.seen[search._id(row)].host for row in self.members if search._id(row) in search.seen)
        hosts.pop(None, None)
        outcome, trigger = tested.outcome, tested.trigger
        acts = None
        if outcome is not None:
            acts = self.p_value <= settings.level and outcome.share >= settings.min_moved
        is_shared = tested.shared.trigger is not None and self.shared_p <= settings.level
        about: dict[str, Any] = {
            "name": name,
            "kind": self.group.kind,
            "manipulated": bool(bound or is_shared or acts),
            "acts": acts,
            "size": int(rows.size),
            "num_flagged": int(flagged.size),
            "num_distinct": len(search._distinct(rows.tolist())),
            "poisoned_at_least": bound,
            "sample_ids": sorted(scored.sample_ids[row] for row in flagged.tolist()),
            "near_misses": sorted(scored.sample_ids[row] for row in near.tolist()),
            "medoids": [scored.sample_ids[row] for row in self.medoids()],
            "words": words,
            "captions": [{"caption": text[:300], "count": count} for text, count in _commonest(captions, 3)],
            "hosts": [{"host": host, "count": count} for host, count in _commonest(hosts, 3)],
            "points_at": {"words": target, "captions": self._nearest_captions(clean_rows)},
            "shared_pixels": self._shared_pixels(),
            "trigger": None if trigger is None else _trigger(trigger, search.victim.image_size),
            "effect": None if outcome is None else {**_rounded(described(outcome)), "p_adjusted": self.p_value},
            "why_not": tested.why_not,
        }
        return {**about, "said": said(about)}

    def medoids(self) -> list[int]:
        """The five members whose residuals are nearest to all others'."""
        search = self.search
        assert search.residual_NR is not None
        place = {row: number for number, row in enumerate(search.rows.tolist())}
        residual = np.nan_to_num(search.residual_NR[[place[row] for row in self.members]].astype(np.float64))
        unit = residual / np.maximum(np.linalg.norm(residual, axis=1, keepdims=True), 1e-30)
        order = np.argsort(-(unit @ unit.sum(axis=0)).round(9), kind="stable")
        return [self.members[at] for at in order[:5].tolist()]

    def _shared_pixels(self) -> dict[str, Any] | None:
        shared = self.tested.shared
        if shared.trigger is None:
            return None
        place = _trigger(shared.trigger, self.search.victim.image_size)
        return {**place, "strength": round(shared.strength, 3), "p_value": self.shared_p}

    def _nearest_captions(self, clean_rows: list[int]) -> list[str]:
        """Of the captions of some samples the three that the encoder's own text tower puts nearest to the group."""
        search, victim = self.search, self.search.victim
        there, images = search._images(self.members[:32])
        rows = [*there, *clean_rows]
        captions = sorted({text for row in rows if (text := search.scored.captions[row]) and text.strip()})
        if not isinstance(victim, ClipVictim) or not there or not captions:
            return []
        text_NE = victim.encode_text(captions).cpu().numpy().astype(np.float64)
        image_E = search.embed(images).astype(np.float64).mean(axis=0)
        cosine_N = text_NE @ image_E / np.maximum(np.linalg.norm(text_NE, axis=1), 1e-30)
        return [captions[at][:300] for at in np.argsort(-cosine_N, kind="stable")[:3].tolist()]

    def draw(self, folder: Place, clean: Images) -> None:
        """Write strips of pictures: medoids; what members and clean pictures are on average, their difference, and
        where members agree more than clean pictures; the trigger; clean pictures, and the same stamped."""
        search, trigger = self.search, self.tested.trigger
        members = search._images(self.members)[1]
        strips = {"medoids": search._images(self.medoids())[1]}
        if len(members) and len(clean):
            strips["shared"] = shared_strip(members, clean)
        if trigger is not None:
            shown = clean[list(self.tested.shown)]
            grey = np.full((1, *clean.shape[1:]), 128, np.uint8)
            strips |= {"trigger": trigger.stamp(grey), "clean": shown, "stamped": trigger.stamp(shown)}
        for name, images in strips.items():
            if len(images):
                write_atomically(folder / f"{name}.png", encode_image(np.concatenate([*images], axis=1), "png"))


def shared_strip(members: Images, clean: Images) -> Images:
    """Four pictures: the members' mean, the clean pictures' mean, their difference (grey is none), and the share of
    members less the share of clean pictures that have the members' median there (white is all)."""
    mean, other = members.mean(axis=0), clean.mean(axis=0)
    _, member_HW, clean_HW = agreement(members, clean)
    excess_HWC = np.repeat(255 * (member_HW - clean_HW).clip(0, 1)[..., None], 3, axis=2)
    return np.stack([mean, other, 128 + (mean - other) / 2, excess_HWC]).round().clip(0, 255).astype(np.uint8)


def said(about: dict[str, Any]) -> str:
    """A group in one sentence."""
    size, bound, flagged = about["size"], about["poisoned_at_least"], about["num_flagged"]
    some = f"{flagged:,} samples" if flagged else f"{size:,} samples, none of them flagged"
    if flagged and size > flagged:
        some += f" and {size - flagged:,} near misses"
    if bound:
        some += f" (at least {bound:,} of them poisoned)"
    caption = f", caption '{about['words'][0]['word']}'" if about["words"] else ""
    trigger, effect = about["trigger"], about["effect"]
    if trigger is None:
        return f"{some}{caption}: not tested ({about['why_not']})"
    what = f"patch of {trigger['width']}x{trigger['height']} px {trigger['where']}"
    if trigger["kind"] == "pattern":
        what = "no local patch, a pattern over the whole picture"
    elsewhere = effect["moved_elsewhere"]
    if trigger["kind"] == "window" and elsewhere is not None and elsewhere >= effect["moved"] / effect["of"] / 2:
        what = f"patch of {trigger['width']}x{trigger['height']} px at any place"
    target = about["points_at"]["words"]
    to = f"to '{target[0]['word']}'" if target else "to the group's company"
    moves = f"moves {effect['moved']:,} of {effect['of']:,} clean pictures {to}"
    if about["acts"]:
        return f"{some}{caption}, {what}, acts: {moves} (p = {effect['p_adjusted']:.2g})"
    return f"{some}{caption}; nothing acts in this encoder: what they share most ({what}) {moves}"


def _trigger(trigger: Trigger, side: int) -> dict[str, Any]:
    height, width = trigger.size
    return {
        "kind": trigger.kind,
        "where": trigger.where(side),
        "top": trigger.top,
        "left": trigger.left,
        "height": height,
        "width": width,
        "num_px": int(trigger.mask_HW.sum()),
        "keep": round(trigger.keep, 3),
    }


def _commonest(counts: Counter[Any], num: int) -> list[tuple[Any, int]]:
    return sorted(counts.items(), key=lambda one: (-one[1], one[0]))[:num]


def _rounded(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _rounded(value) for key, value in values.items()}
    return round(values, 6) if isinstance(values, float) else values

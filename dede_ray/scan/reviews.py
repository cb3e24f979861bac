"""Reviews: what people said of samples that they looked at. One JSON line per look:

    {"sample_id": "train-00003.tar/000300012", "verdict": "poisoned", "who": "ada", "when": "2026-03-01T10:15:00Z"}

The verdict is poisoned, clean or unsure. Files are appended to and never rewritten, so several people may look at once,
each into a file of their own or all into one. Of one person's looks at a sample the last one counts; where persons
differ, the sample is unsure, and named. A last line without its end, as a crash leaves it, is counted and passed over;
any other line that cannot be read stops with file and line, because a lost look might be the one that mattered.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Literal, cast, get_args

from dede_ray.data.first_bytes import NUM_BYTES, what_is
from dede_ray.data.ledger import named
from dede_ray.runtime.config import Mistake, parse_json
from dede_ray.runtime.store import Named, Place, place

logger = logging.getLogger(__name__)

Said = Literal["poisoned", "clean", "unsure"]
SAID: tuple[Said, ...] = get_args(Said)
KEYS = ("sample_id", "verdict", "who", "when")
EXAMPLE = '{"sample_id": "train-00003.tar/000300012", "verdict": "clean", "who": "ada", "when": "2026-03-01T10:15:00Z"}'


@dataclass(frozen=True)
class Look:
    """One look of one person at one sample."""

    sample_id: str
    verdict: Said
    who: str
    when: datetime
    """With a time zone; UTC where the line named none."""


@dataclass(frozen=True)
class Reviews:
    """What all looks together say."""

    verdicts: Mapping[str, Said] = field(default_factory=dict)
    """Of each sample that was looked at."""
    num_looks: int = 0
    num_torn: int = 0
    """Last lines without their end."""
    disagreed: tuple[str, ...] = ()
    """Ids of samples that persons judge differently, sorted; they are unsure."""

    def report(self, known: Iterable[str]) -> dict[str, Any]:
        """In numbers, ready for JSON.

        Args:
            known: ids of the samples there are; looks at others are counted and some named, and change nothing.
        """
        unknown = sorted(self.verdicts.keys() - set(known))
        if unknown:
            logger.warning("reviews of %s samples that are not of this corpus: %s", len(unknown), named(unknown))
        said = [*self.verdicts.values()]
        return {
            "looks": self.num_looks,
            **{verdict: said.count(verdict) for verdict in SAID},
            "torn_lines": self.num_torn,
            "disagreed": [*self.disagreed],
            "unknown": len(unknown),
            "unknown_first": unknown[:3],
        }


def read_reviews(paths: str | list[str] | None) -> Reviews:
    """Read one or several files of looks; without any, nobody has looked.

    Raises:
        Mistake: a file that is not there or is something else, or a line that is no look, with file and line.
    """
    looks, num_torn = list[Look](), 0
    for path in [paths] if isinstance(paths, str) else [*dict.fromkeys(paths or ())]:
        found, is_torn = _read_file(path)
        looks += found
        num_torn += is_torn
    return count_looks(looks, num_torn)


def count_looks(looks: Iterable[Look], num_torn: int = 0) -> Reviews:
    """What looks say together: each person's last one, equal times in the order given; unsure where persons differ."""
    last: dict[str, dict[str, Look]] = {}
    num_looks = 0
    for look in looks:
        num_looks += 1
        of_sample = last.setdefault(look.sample_id, {})
        if look.who not in of_sample or look.when >= of_sample[look.who].when:
            of_sample[look.who] = look
    said = {name: {look.verdict for look in by_person.values()} for name, by_person in sorted(last.items())}
    disagreed = tuple(name for name, verdicts in said.items() if len(verdicts) > 1)
    if disagreed:
        logger.warning(
            "reviewers disagree about %s samples, which count as unsure: %s", len(disagreed), named(disagreed)
        )
    verdicts = {name: next(iter(verdicts)) if len(verdicts) == 1 else "unsure" for name, verdicts in said.items()}
    return Reviews(cast(dict[str, Said], verdicts), num_looks, num_torn, disagreed)


def _read_file(path: Named) -> tuple[list[Look], bool]:
    """The looks of a file, and whether its last line is torn."""
    where = place(path)
    if not where.is_file():
        raise Mistake(
            f"reviewed: there is no file {where}; write looks there, one JSON line each, or leave `reviewed` out"
        )
    content = where.read_bytes().removeprefix(b"\xef\xbb\xbf")
    kind = what_is(content[:NUM_BYTES])
    if content.strip() and kind not in (None, "JSON"):
        raise Mistake(f"reviewed: {where} is {kind}; expected one JSON line per look, such as {EXAMPLE}")
    lines = content.split(b"\n")
    is_torn = bool(lines[-1].strip()) and not _is_json(lines[-1])  # an editor may only leave out the last end of line
    if is_torn:
        logger.warning("%s: its last line, %s, is torn, and is passed over", where, f"{len(lines):,}")
        lines.pop()
    return [_read_line(line, where, number) for number, line in enumerate(lines, 1) if line.strip()], is_torn


def _is_json(line: bytes) -> bool:
    try:
        parse_json(io.BytesIO(line))
    except ValueError:
        return False
    return True


def _read_line(line: bytes, where: Place, number: int) -> Look:
    try:
        row = parse_json(io.BytesIO(line))
        if not isinstance(row, dict):
            raise ValueError(f"it is {json.dumps(row)[:80]}")
        if lacking := [key for key in KEYS if key not in row]:
            raise ValueError(f"it has no {', '.join(lacking)}, only {', '.join(map(repr, row)) or 'nothing'}")
        if wrong := [key for key in KEYS if not isinstance(row[key], str) or not row[key].strip()]:
            raise ValueError(f"its {wrong[0]} is {json.dumps(row[wrong[0]])[:80]}, and should be text")
        if row["verdict"] not in SAID:
            raise ValueError(f"its verdict is {row['verdict'][:80]!r}, and should be one of {', '.join(SAID)}")
        try:
            when = datetime.fromisoformat(row["when"].strip().removesuffix("Z").removesuffix("z"))
        except ValueError:
            raise ValueError(f"its time is {row['when'][:80]!r}, and should be as 2026-03-01T10:15:00Z") from None
    except ValueError as error:  # as are those of JSON and of UTF-8
        raise Mistake(
            f"reviewed: {where}, line {number:,}, is no look: {error}; expected a line such as {EXAMPLE}; mend the "
            "line or take it out"
        ) from None
    when = when if when.tzinfo else when.replace(tzinfo=timezone.utc)
    return Look(row["sample_id"], row["verdict"], row["who"].strip(), when)

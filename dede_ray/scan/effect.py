"""What the pictures of a group share, and whether it acts in this encoder when it is put on clean pictures.

    shared_patch(members, clean)            the same pixels at the same place, where clean pictures differ
    strongest_windows(members, ...)         windows without which members leave their group: triggers at any place
    shared_pattern(members, clean)          what lies over the whole of them: blended pictures, waves
    EffectTest().run(pictures, embed, ...)  the best of these, put on clean pictures, against controls

A clean picture has *moved* where the encoder afterwards finds it more like the clean pictures that the group is among
than like those that it was among itself. No truth is needed for that, and an encoder which merely sees a visible
patch, and says so the same way of every picture, moves nothing: a picture keeps its own company.

The test is a rank among controls of the trigger's own shape and strength, put on the same pictures, in three families:
*alike*, what clean pictures of the group's caption or company have in its place (a group of cars does not act by a
wheel, as the wheels of other cars do the same); *content*, its pixels shuffled, cells of full colours, patches of clean
pictures, noise, in its place; *place*, itself at other places. What is ranked is how many pictures move; a control that
moves as many counts against the trigger. It has to stand out among the first family, and among one of the others: some
backdoors act by a colour in a corner, and some by a pattern anywhere. Where the trigger is one of exchangeable draws,
the p-value of each family is exact (Besag & Clifford, Biometrika 1991, as draws stop early). The smaller of the last
two is doubled; the larger of that and the first counts, times the number of triggers among which the best was chosen.

Shapes: M members, N clean pictures, H x W pixels, E width of the embedding. Pictures are uint8 (.., H, W, 3), all of
the encoder's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import ndimage

from dede_ray.runtime.config import Config

Images = NDArray[np.uint8]
Rows = NDArray[np.floating]
Embed = Callable[[Images], NDArray[np.floating]]
"""Pictures (N, H, W, 3) to embeddings (N, E), as the victim gives them."""

TOLERANCE = 16
"""Grey levels by which pixels that agree differ, at most: what JPEG leaves of a pasted patch."""
NUM_KINDS = 3
"""Triggers among which the best is chosen: a patch in its place, a window, a pattern over all."""
FAR = 64
"""Mean grey levels by which a patch is another one than the trigger: a quarter of the range."""
ENOUGH = 10
"""Controls that do as much as the trigger, after which no more are drawn."""
LEAST_MEMBERS = 5
LEAST_PATCH_PX = 4
MOST_LOOKED_AT = 16
"""Members in which windows are looked for."""
MOST_COMPARED = 150
"""Clean pictures whose pixels are compared with a group's; a third as many members."""
COARSE_PX = 64
"""Of larger pictures not all pixels are compared with what chance would share."""
BATCH = 128


@dataclass(frozen=True, eq=False)
class Trigger:
    """A change of pictures: `image * keep + add` within a mask, from `top` and `left` on."""

    kind: Literal["patch", "window", "pattern"]
    top: int
    left: int
    add_HWC: Rows
    """Grey levels; of a patch its pixels."""
    mask_HW: NDArray[np.bool_]
    keep: float = 0.0

    @property
    def size(self) -> tuple[int, int]:
        return self.mask_HW.shape[0], self.mask_HW.shape[1]

    def stamp(self, image_NHWC: Images) -> Images:
        """Stamp copies of pictures."""
        stamped = image_NHWC.copy()
        height, width = self.size
        part = stamped[:, self.top : self.top + height, self.left : self.left + width]
        changed = np.rint(part * self.keep + self.add_HWC).clip(0, 255).astype(np.uint8)
        part[:, self.mask_HW] = changed[:, self.mask_HW]
        return stamped

    def where(self, side: int) -> str:
        """Its place in words, of a picture of this side."""
        if self.kind == "pattern":
            return "over the whole picture"
        (height, width), third = self.size, side / 3
        row, column = self.top + height / 2, self.left + width / 2
        rows = "top" if row < third else "bottom" if row > 2 * third else ""
        columns = "left" if column < third else "right" if column > 2 * third else ""
        if rows and columns:
            return f"in the {rows} {columns} corner"
        return f"at the {rows or columns}" if rows or columns else "in the middle"


# ------------------------------------------------------------------------------------------------ what pictures share


def agreement(member_MHWC: Images, *others: Images) -> tuple[Any, ...]:
    """Each pixel's median over the members (H, W, 3); the share of them, and of each of the others, that have it."""
    middle = len(member_MHWC) // 2
    median_HWC = np.partition(member_MHWC, middle, axis=0)[middle]
    low_HWC, high_HWC = (
        np.clip(median_HWC.astype(int) + by, 0, 255).astype(np.uint8) for by in (-TOLERANCE, TOLERANCE)
    )

    def share(image_NHWC: Images) -> Rows:
        return ((image_NHWC >= low_HWC) & (image_NHWC <= high_HWC)).all(axis=3).mean(axis=0)

    return median_HWC, share(member_MHWC), *map(share, others)


def shared_patch(member_MHWC: Images, *others: Images) -> tuple[Trigger | None, float]:
    """The pixels that most members have in common and no others have, in one place; and how many that are.

    The second value is what to compare with the same of other pictures: the sum of (share of members - share of others)
    over the place, 0 where there is none.

    Args:
        others: clean pictures, of each kind that members might resemble.
    """
    median_HWC, member_HW, *other_HW = agreement(member_MHWC, *others)
    excess_HW = member_HW - np.max(other_HW, axis=0)
    least = max(0.5, 4 * np.sqrt(0.25 / len(member_MHWC) + 0.25 / min(map(len, others))))
    is_shared_HW = excess_HW >= min(least, 0.9)
    # Where a trigger has the colour of what is usual there, it has gaps: places within two pixels belong together.
    label_HW, num = ndimage.label(ndimage.binary_dilation(is_shared_HW, np.ones((3, 3))), np.ones((3, 3)))
    if not num:
        return None, 0.0
    weight = ndimage.sum_labels(excess_HW * is_shared_HW, label_HW, np.arange(1, num + 1))
    kept_HW = is_shared_HW & np.isin(label_HW, 1 + np.flatnonzero(weight >= weight.max() / 4))
    rows, columns = np.nonzero(kept_HW)
    top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
    strength = float(weight.max())
    if kept_HW.sum() < LEAST_PATCH_PX or (bottom - top) * (right - left) > kept_HW.size / 2:
        return None, strength
    box = slice(top, bottom), slice(left, right)
    mask_HW = member_HW[box] >= 0.5  # also what clean pictures have there
    return Trigger("patch", int(top), int(left), median_HWC[box].astype(np.float64), mask_HW), strength


def shared_pattern(member_MHWC: Images, clean_NHWC: Images, *others: Images) -> Trigger | None:
    """What lies over all members: the difference of their mean to that of clean pictures, and how much of the contrast
    is left of them.

    Pictures differ in what they show, and so do means of a few. How much, at each spatial frequency, is known from the
    clean pictures; frequencies that do not exceed it are left out (Wiener's filter), as are those at which the members'
    mean is like that of some others.
    """
    mean_HWC = clean_NHWC.mean(axis=0, dtype=np.float64)
    power = np.mean([np.abs(np.fft.fft2(one - mean_HWC, axes=(0, 1))) ** 2 for one in clean_NHWC], axis=0)
    member_HWC, kept, changes = member_MHWC.mean(axis=0, dtype=np.float64), np.ones_like(power), []
    for other_NHWC in (clean_NHWC, *others):
        changes.append(np.fft.fft2(member_HWC - other_NHWC.mean(axis=0, dtype=np.float64), axes=(0, 1)))
        noise = power * (1 / len(member_MHWC) + 1 / len(other_NHWC))
        kept = np.minimum(kept, np.clip(1 - 3 * noise / np.maximum(np.abs(changes[-1]) ** 2, 1e-12), 0, 1))
    difference_HWC = np.fft.ifft2(kept * changes[0], axes=(0, 1)).real
    if np.sqrt((difference_HWC**2).mean()) < 0.5:
        return None
    spread = max(float(clean_NHWC.var(axis=0, dtype=np.float64).mean()), 1e-12)
    keep = float(np.clip(np.sqrt(member_MHWC.var(axis=0, dtype=np.float64).mean() / spread), 0, 1))
    return _pattern(difference_HWC, mean_HWC, keep)


def _pattern(difference_HWC: Rows, mean_HWC: Rows, keep: float) -> Trigger:
    add_HWC = difference_HWC + (1 - keep) * mean_HWC
    return Trigger("pattern", 0, 0, add_HWC, np.ones(add_HWC.shape[:2], bool), keep)


def strongest_windows(
    member_MHWC: Images, clean_NHWC: Images, embed: Embed, lead: Callable[[Rows], Rows]
) -> list[tuple[float, Trigger]]:
    """Of each member the window that holds it in its group: covered by a clean picture's, the member leaves most.

    Args:
        lead: how much of the group is in embeddings (N, E): (N,).

    Returns:
        How much each member loses, and the window; most first.
    """
    found = []
    side, windows = member_MHWC.shape[1], [*_windows(member_MHWC.shape[1])]
    for number, image_HWC in enumerate(member_MHWC):
        other_HWC = clean_NHWC[number % len(clean_NHWC)]
        covered = np.repeat(image_HWC[None], 1 + len(windows), axis=0)
        for row, (top, left, size) in enumerate(windows, 1):
            box = slice(top, top + size), slice(left, left + size)
            covered[row][box] = other_HWC[box]
        lead_W = lead(embed(covered))
        loss_W = lead_W[0] - lead_W[1:]
        # A larger window covers more of anything: the smaller counts, where it does nearly as much.
        score_W = loss_W - 0.1 * abs(loss_W).max() * np.array([size for _, _, size in windows]) / side
        best = int(np.argmax(score_W))
        top, left, size = windows[best]
        pixels = image_HWC[top : top + size, left : left + size].astype(np.float64)
        found.append((float(loss_W[best]), Trigger("window", top, left, pixels, np.ones((size, size), bool))))
    return sorted(found, key=lambda one: -one[0])


def _windows(side: int) -> Iterator[tuple[int, int, int]]:
    step = max(1, side // 8)
    for size in (max(2, side // 4), max(3, 3 * side // 8)):
        starts = sorted({*range(0, side - size, step), side - size})
        yield from ((top, left, size) for top in starts for left in starts)


# ------------------------------------------------------------------------------------------------ moved, or not


class Company:
    """Among which clean pictures each clean picture is, and among which the group.

    Embeddings are seen from the clean ones' mean and brought to length one.

    Args:
        clean_NE: embeddings of clean pictures.
        member_ME: those of the group.
        k: pictures that are company.
    """

    def __init__(self, clean_NE: Rows, member_ME: Rows, k: int):
        self.mean_E = clean_NE.mean(axis=0, dtype=np.float64)
        clean = self.unit(clean_NE)
        self.lead_E = self.unit(self.unit(member_ME).mean(axis=0, keepdims=True) + self.mean_E)[0]
        self.nearest = np.argsort(-clean @ self.lead_E, kind="stable")
        self.target_E = clean[self.nearest[:k]].mean(axis=0)
        cosine_NN = clean @ clean.T
        np.fill_diagonal(cosine_NN, -np.inf)
        near_Nk = np.argsort(-cosine_NN, axis=1, kind="stable")[:, :k]
        self.own_NE = clean[near_Nk].mean(axis=1)
        in_target = np.asarray(np.isin(near_Nk, self.nearest[:k]).any(axis=1))
        in_target[self.nearest[:k]] = True
        self.apart = np.flatnonzero(~in_target)
        """Clean pictures that are in other company than the group."""

    def unit(self, embedding_NE: Rows) -> Rows:
        centred = np.asarray(embedding_NE, np.float64) - self.mean_E
        return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-30)

    def lead(self, embedding_NE: Rows) -> Rows:
        """How much of the group's direction is in embeddings: cosines (N,)."""
        return self.unit(embedding_NE) @ self.lead_E

    def margin(self, embedding_NE: Rows, rows: NDArray[np.int64]) -> Rows:
        """How much more like the group's company than like their own (of the clean pictures `rows`) these are."""
        unit = self.unit(embedding_NE)
        return unit @ self.target_E - (unit * self.own_NE[rows]).sum(axis=1)


@dataclass(frozen=True, eq=False)
class Pictures:
    """What a group's test looks at; in an order that keys have drawn."""

    members: Images
    """Distinct pictures of the group."""
    clean: Images
    """Clean ones, as far as is known: not flagged, nor copies of members."""
    alike: Images
    """Clean ones that have the group's caption."""


@dataclass(frozen=True, eq=False)
class Shared:
    """What members share in their pixels, in one place."""

    trigger: Trigger | None
    strength: float
    p_value: float
    """How often as many clean pictures, at random or of the group's company, share as much."""


@dataclass(frozen=True)
class Outcome:
    """What came of putting a trigger on clean pictures."""

    moved: int
    """Clean pictures that moved into the group's company."""
    of: int
    moved_elsewhere: float | None
    """Share that moves where the same patch is put at other places; None for a pattern."""
    moved_by_controls: float
    """Mean share over all controls."""
    p_value: float
    """Before it is adjusted for the number of groups."""
    p_of: dict[str, float]
    num_draws: dict[str, int]
    """Controls drawn, by family; fewer than declared where it was soon clear."""

    @property
    def share(self) -> float:
        return self.moved / self.of if self.of else 0.0


@dataclass(frozen=True, eq=False)
class Tested:
    """A group's trigger and its effect, or why there is none."""

    shared: Shared
    trigger: Trigger | None = None
    outcome: Outcome | None = None
    why_not: str = ""
    company: Sequence[int] = ()
    """Places, among the clean pictures, of those that the group is among; nearest first."""
    shown: Sequence[int] = ()
    """Places of some clean pictures that were tested."""


class EffectTest(Config):
    """Whether what a group shares moves clean pictures in this encoder: `acts`."""

    level: float = Field(0.05, gt=0, lt=1)
    """An honest encoder's groups, all together, act with this chance at most (Holm)."""
    min_moved: float = Field(0.2, gt=0, le=1)
    """Share of clean pictures that has to move."""
    num_clean: int = Field(100, ge=16)
    """Clean pictures that the trigger is put on."""
    num_compared: int = Field(8, ge=4)
    """Those of them that controls are put on, too."""
    num_chosen_on: int = Field(8, ge=4)
    """Other clean pictures, on which the trigger is chosen."""
    k: int = Field(10, ge=1)
    """Clean pictures that are company."""

    def num_draws(self, num_groups: int) -> int:
        """Controls of each family: enough that a trigger which no control reaches has half of the level."""
        return int(np.ceil(4 * NUM_KINDS * max(1, num_groups) / self.level)) - 1

    @property
    def num_pictures(self) -> int:
        """Clean pictures to read: some are in the group's own company."""
        return 2 * (self.num_clean + self.num_chosen_on) + 4 * self.k

    def run(self, pictures: Pictures, embed: Embed, num_groups: int, rng: np.random.Generator) -> Tested:
        """Find what a group shares, and test it.

        Args:
            num_groups: tested together with this one.
            rng: draws the controls.
        """
        members, clean = pictures.members, pictures.clean
        if len(members) < LEAST_MEMBERS or len(clean) < 4 * self.k:
            few = "the group has" if len(members) < LEAST_MEMBERS else "the corpus has only"
            num = len(members) if len(members) < LEAST_MEMBERS else len(clean)
            what = "distinct pictures" if len(members) < LEAST_MEMBERS else "distinct clean pictures to test it on"
            return Tested(Shared(None, 0.0, 1.0), why_not=f"{few} {num} {what}")
        clean_NE = _embedded(embed, clean)
        looked_at = members[: 2 * MOST_LOOKED_AT]
        member_ME = _embedded(embed, looked_at)
        if not (np.isfinite(clean_NE).all() and np.isfinite(member_ME).all()):
            return Tested(Shared(None, 0.0, 1.0), why_not="the encoder gives no numbers for some of its pictures")
        company = Company(clean_NE, member_ME, self.k)
        alike = pictures.alike
        if len(alike) < self.k:
            alike = np.concatenate([alike, clean[company.nearest[: 3 * self.k]]])
        shared = shared_by(members, clean, alike, rng, int(2 * max(1, num_groups) / self.level) - 1)
        apart = company.apart
        nearest = company.nearest[: self.k].tolist()
        if len(apart) < self.num_chosen_on + self.num_compared:
            why = "nearly all clean pictures are in the group's own company, so that nothing can move there"
            return Tested(shared, why_not=why, company=nearest)
        chosen_on, tested = apart[: self.num_chosen_on], apart[self.num_chosen_on :][: self.num_clean]
        world = _World(embed, company, clean, clean_NE, alike, rng)
        trigger = world.best(shared.trigger, members, chosen_on)
        if trigger is None:
            return Tested(shared, why_not="its pictures share nothing that could be put on others", company=nearest)
        outcome = self._outcome(world, trigger, members, tested, self.num_draws(num_groups))
        return Tested(shared, trigger, outcome, company=nearest, shown=tested[:8].tolist())

    def _outcome(
        self, world: _World, trigger: Trigger, members: Images, tested: NDArray[np.int64], num_draws: int
    ) -> Outcome:
        compared = tested[: self.num_compared]
        moved = int((world.margins([trigger], tested)[0] > 0).sum())
        moved_here = float((world.margins([trigger], compared)[0] > 0).mean())
        elsewhere = [*world.elsewhere(trigger)]
        p_of, drawn, by_controls = dict[str, float](), dict[str, int](), list[float]()

        def rank(family: str) -> float:
            p_of[family], drawn[family], shares = self._rank(
                world, family, trigger, len(members), moved_here, compared, num_draws
            )
            by_controls.extend(shares)
            return p_of[family]

        p_value = rank("alike")
        if drawn["alike"] == num_draws:
            special = rank("content")
            if elsewhere:  # special by what it is, or by where it is
                is_least = special < 1.5 / (num_draws + 1)
                special = 2 * min(special, special if is_least else rank("place"))
            p_value = max(p_value, special)
        return Outcome(
            moved,
            len(tested),
            float((world.margins(elsewhere, compared) > 0).mean()) if elsewhere else None,
            float(np.mean(by_controls)),
            float(min(1.0, NUM_KINDS * p_value)),
            p_of,
            drawn,
        )

    def _rank(
        self,
        world: _World,
        family: str,
        trigger: Trigger,
        num_members: int,
        moved: float,
        compared: NDArray[np.int64],
        num_draws: int,
    ) -> tuple[float, int, list[float]]:
        """The p-value against one family of controls: how rare it is that one moves as many of these pictures. Then how
        many were drawn, and what share of pictures each moved.

        Drawing ends where so many controls do as much as the trigger that it is not rare.
        """
        reached, shares = 0, list[float]()
        step = max(1, BATCH // len(compared))
        moved -= 1e-9
        for start in range(0, num_draws, step):
            controls = [world.control(family, trigger, num_members) for _ in range(min(step, num_draws - start))]
            for share in (world.margins(controls, compared) > 0).mean(axis=1).tolist():
                shares.append(share)
                reached += share >= moved
                if reached == ENOUGH:
                    return reached / len(shares), len(shares), shares
        return (reached + 1) / (num_draws + 1), num_draws, shares


def shared_by(members: Images, clean: Images, alike: Images, rng: np.random.Generator, num_draws: int) -> Shared:
    """What members share in one place, and whether clean pictures share as much: drawn at random, and of the group's
    company."""
    clean = clean[:MOST_COMPARED]
    trigger, strength = shared_patch(members, clean, alike)
    if not strength:
        return Shared(None, 0.0, 1.0)
    coarse = slice(None, None, max(1, clean.shape[1] // COARSE_PX))
    members, clean, alike = (image_NHWC[:, coarse, coarse] for image_NHWC in (members, clean, alike))
    p_values = []
    for pool in (clean, alike):
        num = min(len(members), len(pool) // 2, MOST_COMPARED // 3)
        if num < LEAST_MEMBERS:
            continue
        mine = shared_patch(members[:num], clean, alike)[1]
        reached, drawn = 0, 0
        while drawn < num_draws and reached <= num_draws // 20:
            others = pool[rng.choice(len(pool), num, replace=False)]
            reached, drawn = reached + (shared_patch(others, clean, alike)[1] >= mine), drawn + 1
        p_values.append((reached + 1) / (drawn + 1))
    return Shared(trigger, strength, max(p_values, default=1.0))


def _embedded(embed: Embed, images: Images) -> Rows:
    return np.concatenate([np.asarray(embed(images[at : at + BATCH])) for at in range(0, len(images), BATCH)])


class _World:
    """The clean pictures, and what triggers do to them."""

    def __init__(
        self, embed: Embed, company: Company, clean: Images, clean_NE: Rows, alike: Images, rng: np.random.Generator
    ):
        self.embed, self.company, self.clean, self.clean_NE = embed, company, clean, clean_NE
        self.alike, self.rng = alike, rng
        self.mean_HWC = clean.mean(axis=0, dtype=np.float64)
        self.windows: list[tuple[float, Trigger]] | None = None

    def before(self, rows: NDArray[np.int64]) -> Rows:
        """Margins of the pictures as they are."""
        return self.company.margin(self.clean_NE[rows], rows)

    def margins(self, triggers: Sequence[Trigger], rows: NDArray[np.int64]) -> Rows:
        """(triggers, rows): margins of the clean pictures `rows` with each trigger on them."""
        stamped = np.concatenate([one.stamp(self.clean[rows]) for one in triggers])
        embedding = np.nan_to_num(_embedded(self.embed, stamped), nan=0.0, posinf=0.0, neginf=0.0)
        return self.company.margin(embedding, np.tile(rows, len(triggers))).reshape(len(triggers), len(rows))

    def gains(self, triggers: Sequence[Trigger], rows: NDArray[np.int64]) -> list[float]:
        """By how much each trigger raises the margin, on average."""
        return (self.margins(triggers, rows) - self.before(rows)).mean(axis=1).tolist()

    def best(self, patch: Trigger | None, members: Images, rows: NDArray[np.int64]) -> Trigger | None:
        """The trigger that moves these pictures most; of about equal ones what is seen most plainly."""
        found = [patch] if patch is not None else []
        if not (found and (self.margins(found, rows) > 0).mean() >= 0.75):
            found += [
                one for one in (self._window(members, rows), shared_pattern(members, self.clean, self.alike)) if one
            ]
        if not found:
            return None
        gains = np.array(self.gains(found, rows))
        return found[int(np.flatnonzero(gains >= gains.max() - 0.2 * abs(gains.max()))[0])]

    def _window(self, members: Images, rows: NDArray[np.int64]) -> Trigger | None:
        """The window of some member that moves these pictures most, cut down to what does it."""
        lead = self.company.lead
        found = [
            one for loss, one in strongest_windows(members[:MOST_LOOKED_AT], self.clean, self.embed, lead) if loss > 0
        ]
        if not found:
            return None
        gains = self.gains(found[:8], rows)
        best = int(np.argmax(gains))
        return self._cut_down(found[best], gains[best], rows) if gains[best] > 0 else found[best]

    def _cut_down(self, window: Trigger, gain: float, rows: NDArray[np.int64]) -> Trigger:
        """Cut sides off a window as long as nearly all of its effect is left."""
        best, step = window, max(1, window.size[0] // 8)
        for _ in range(24):
            tries = [*_smaller(best, step)]
            if not tries:
                break
            gains = self.gains(tries, rows)
            if max(gains) < 0.95 * gain:
                break
            best = tries[int(np.argmax(gains))]
        return best

    def elsewhere(self, trigger: Trigger, num: int = 8) -> Iterator[Trigger]:
        """The same patch at other places, apart from its own where there is room."""
        side, (height, width) = self.clean.shape[1], trigger.size
        if trigger.kind == "pattern":
            return
        places = [
            (top, left)
            for top in range(side - height + 1)
            for left in range(side - width + 1)
            if abs(top - trigger.top) >= height or abs(left - trigger.left) >= width
        ]
        for number in self.rng.choice(len(places), min(num, len(places)), replace=False) if places else ():
            yield replace(trigger, top=places[number][0], left=places[number][1])

    # ---------------------------------------------------------------------------------------------- controls

    def control(self, family: str, trigger: Trigger, num_members: int) -> Trigger:
        """One draw of a family."""
        if family == "place":
            return next(self.elsewhere(trigger, 1))
        if trigger.kind == "pattern":
            return self._alike_pattern(trigger, num_members) if family == "alike" else self._random_pattern(trigger)
        return self._alike_patch(trigger, num_members) if family == "alike" else self._random_patch(trigger)

    def _some(self, num: int) -> Images:
        """Some pictures like the group's."""
        return self.alike[self.rng.choice(len(self.alike), min(num, max(1, len(self.alike) // 2)), replace=False)]

    def _alike_patch(self, trigger: Trigger, num_members: int) -> Trigger:
        """What these have at this place: one of them, or the median of some. Of a window that of some at any place, or
        of the strongest window of one."""
        height, width = trigger.size
        top, left = trigger.top, trigger.left
        if trigger.kind == "patch":
            some = self._some(1 if self.rng.random() < 0.5 else num_members)
            cut = some[:, top : top + height, left : left + width]
            return replace(trigger, add_HWC=np.median(cut, axis=0))
        if self.windows is None:
            lead = self.company.lead
            self.windows = strongest_windows(self.alike[:MOST_LOOKED_AT], self.clean, self.embed, lead)
        some, side = self._some(1), self.clean.shape[1]
        at_top, at_left = (int(self.rng.integers(side - length + 1)) for length in (height, width))
        if self.rng.random() < 0.5:
            number = int(self.rng.integers(len(self.windows)))
            window = self.windows[number][1]
            spare = [max(0, whole - part) for whole, part in zip(window.size, trigger.size, strict=True)]
            at_top, at_left = (int(self.rng.integers(room + 1)) for room in spare)
            some = np.asarray(window.add_HWC[None])
        cut = some[:, at_top : at_top + height, at_left : at_left + width]
        if cut.shape[1:3] != (height, width):
            cut = self._some(1)[:, top : top + height, left : left + width]
        return replace(trigger, add_HWC=np.median(cut, axis=0))

    def _random_patch(self, trigger: Trigger) -> Trigger:
        """Its own pixels in another order, cells of full colours, or what a clean picture has there; nothing that is
        nearly the trigger."""
        inside = trigger.add_HWC[trigger.mask_HW]
        (height, width), top, left = trigger.size, trigger.top, trigger.left
        for attempt in range(20):
            if self.rng.random() < 0.2:
                one = self.clean[self.rng.integers(len(self.clean))]
                add = one[top : top + height, left : left + width].astype(np.float64)
            elif attempt < 10 and np.ptp(inside, axis=0).max() > 2 * TOLERANCE and self.rng.random() < 0.5:
                add = trigger.add_HWC.copy()
                add[trigger.mask_HW] = self.rng.permutation(inside)
            else:
                cell = int(self.rng.integers(1, max(2, max(height, width) + 1)))
                grid = 255.0 * self.rng.integers(0, 2, (-(-height // cell), -(-width // cell), 3))
                add = np.kron(grid, np.ones((cell, cell, 1)))[:height, :width]
            if abs(add - trigger.add_HWC)[trigger.mask_HW].mean() >= FAR:
                break
        return replace(trigger, add_HWC=add)

    def _alike_pattern(self, trigger: Trigger, num_members: int) -> Trigger:
        """The same difference, of pictures like the group's, as strong as the trigger's."""
        return self._as_strong(trigger, self._some(num_members).mean(axis=0, dtype=np.float64) - self.mean_HWC)

    def _random_pattern(self, trigger: Trigger) -> Trigger:
        """Its own pixels in another order, or noise that is as smooth as chance wants."""
        difference = trigger.add_HWC - (1 - trigger.keep) * self.mean_HWC
        height, width = trigger.size
        if self.rng.random() < 0.5:
            noise = self.rng.permutation(difference.reshape(-1, 3)).reshape(difference.shape)
        else:
            frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
            frequency[0, 0] = 1 / max(height, width)
            white = np.fft.fft2(self.rng.normal(size=difference.shape), axes=(0, 1))
            noise = np.fft.ifft2(white * frequency[..., None] ** -self.rng.uniform(0, 2), axes=(0, 1)).real
        return self._as_strong(trigger, noise)

    def _as_strong(self, trigger: Trigger, difference_HWC: Rows) -> Trigger:
        own = trigger.add_HWC - (1 - trigger.keep) * self.mean_HWC
        scale = np.sqrt((own**2).mean() / max((difference_HWC**2).mean(), 1e-12))
        return _pattern(scale * difference_HWC, self.mean_HWC, trigger.keep)


def _smaller(trigger: Trigger, step: int) -> Iterator[Trigger]:
    """A window without a strip at one of its sides."""
    height, width = trigger.size
    sides = [
        (step, 0, height, width),
        (0, step, height, width),
        (0, 0, height - step, width),
        (0, 0, height, width - step),
    ]
    for top, left, bottom, right in sides:
        if bottom - top >= 2 and right - left >= 2:
            yield replace(
                trigger,
                top=trigger.top + top,
                left=trigger.left + left,
                add_HWC=trigger.add_HWC[top:bottom, left:right],
                mask_HW=trigger.mask_HW[top:bottom, left:right],
            )


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted so that all that are at most the level are true together (Holm, Scand. J. Stat. 1979)."""
    adjusted, highest = [1.0] * len(p_values), 0.0
    for rank, row in enumerate(np.argsort(p_values, kind="stable").tolist()):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[row]))
        adjusted[row] = highest
    return adjusted


def described(outcome: Outcome | None) -> dict[str, Any] | None:
    """For JSON."""
    return None if outcome is None else asdict(outcome)

"""The pictures of an evaluation: a gallery of samples as the decoder rebuilt them, figures, and one page of HTML.

`make_gallery` reads the samples back and asks the decoder once more; `draw_page` makes the page and the figures from
what it is given. Captions and ids come from strangers: on the page they are text, never markup.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray
from PIL import Image
from scipy import stats

from dede_ray.data.images import decode_image, to_unit_range
from dede_ray.data.sampling import sample_keys
from dede_ray.data.shards import iter_samples, list_shards, open_shard
from dede_ray.detectors.dede import DeDe
from dede_ray.evaluation.results import (
    REFUSED,
    Numbers,
    Scan,
    auroc_text,
    decision_in_words,
    difference_text,
    number_text,
    promise_in_words,
    reading,
    rule_text,
    share_text,
)
from dede_ray.metrics import roc_curve
from dede_ray.models.decoder import load_decoder
from dede_ray.models.victims import Victim
from dede_ray.runtime.config import Mistake
from dede_ray.scan.calibration import MODES
from dede_ray.scan.score import ScoreConfig

# Shapes: B images of the gallery, L patches.


@dataclass(frozen=True)
class Exhibit:
    """One sample as the decoder saw and rebuilt it; pictures are uint8 HWC at the victim's size."""

    row: int
    """Its row in the scan."""
    pictures: dict[str, np.ndarray]
    num_visible: int
    num_patches: int


Gallery = Mapping[str, Sequence[Exhibit]]
COLUMNS = {
    "input": "input",
    "visible": "what the decoder sees",
    "rebuilt": "rebuilt with the embedding",
    "null": "rebuilt without it",
    "error": "error with the embedding",
}


def make_gallery(scan: Scan, settings: ScoreConfig, victim: Victim, judged: str, num: int, seed: int) -> Gallery:
    """Have the decoder rebuild a few samples again, as it did when it scored them with these settings.

    Returns:
        `num` exhibits at most of each group, poisoned and clean, chosen by the score that was judged; none where the
        detectors hold no decoder.

    Raises:
        Mistake: the shards no longer hold the samples.
    """
    chosen = _choose(scan, judged, num, seed)
    rows = [row for group in chosen.values() for row in group]
    dede = next((detector for detector in settings.detectors if isinstance(detector, DeDe)), None)
    if not rows or dede is None:
        return {group: [] for group in chosen}
    decoder = load_decoder(dede.decoder)
    ids = scan.table["sample_id"].take(pa.array(rows)).to_pylist()
    image_BCHW = to_unit_range(torch.from_numpy(np.stack(_read_images(scan, rows, settings, victim.image_size))))
    device = next((tensor.device for tensor in victim.state_dict().values()), torch.device("cpu"))
    embedding_BE = victim(image_BCHW.to(device)).cpu()
    keys_B, ratio = sample_keys(ids, dede.seed, 0), dede.score_mask_ratio  # the first of the masks that scored
    rebuilt_BCHW, mask_BL = decoder.reconstruct(image_BCHW, embedding_BE, keys_B, ratio)
    pictures = {"input": image_BCHW, "visible": _hide(image_BCHW, mask_BL, decoder.patch_px), "rebuilt": rebuilt_BCHW}
    if decoder.has_null:
        pictures["null"] = decoder.reconstruct(image_BCHW, None, keys_B, ratio)[0]
    error_BHW = (rebuilt_BCHW - image_BCHW).square().mean(dim=1).numpy()
    brightest = max(float(np.quantile(error_BHW, 0.995)), 1e-6)  # one scale for all, so that they compare
    error_BHWC = matplotlib.colormaps["inferno"]((error_BHW / brightest).clip(0, 1))[..., :3]
    arrays = {name: picture.permute(0, 2, 3, 1).numpy() for name, picture in pictures.items()} | {"error": error_BHWC}
    exhibits = {
        row: Exhibit(
            row,
            {name: np.rint(array_BHWC[i] * 255).astype(np.uint8) for name, array_BHWC in arrays.items()},
            int((~mask_BL[i]).sum()),
            mask_BL.shape[1],
        )
        for i, row in enumerate(rows)
    }
    return {group: [exhibits[row] for row in members] for group, members in chosen.items()}


def draw_page(scan: Scan, metrics: Numbers, gallery: Gallery) -> tuple[str, dict[str, bytes]]:
    """Make the page, one HTML file that needs nothing else, no network and no script; and the figures, PNGs by name.

    Whatever comes from shards or file names passes through `_text`; the content security policy of the page, which
    allows no script at all, is a second wall behind it. Without an active backdoor it quotes no number of the detector.
    """
    figures = {"gallery": _draw_gallery(gallery)}
    numbers = []
    if not metrics["void"]:
        figures["roc"], figures["histograms"] = _draw_roc(scan, metrics), _draw_histograms(scan, metrics)
        figures["overview"] = _draw_overview(scan, metrics, gallery)
        curves = {name: _as_svg(figures[name], name) for name in ("roc", "histograms")}
        numbers = [_trust_section(metrics), _figure_section(curves)]
    pictures = {name: _as_png(figure) for name, figure in figures.items()}
    sections = [
        _verdict_section(metrics),
        *numbers,
        _gallery_section(scan, metrics, gallery),
        _list_section(scan, metrics),
        _made_section(metrics),
    ]
    page = PAGE.replace("{style}", STYLE_SHEET).replace("{sections}", "\n".join(sections))
    return page, pictures


# --------------------------------------------------------------------------------------------------------- gallery


def _choose(scan: Scan, judged: str, num: int, seed: int) -> dict[str, list[int]]:
    """Choose rows: the poisoned samples with the highest scores, flagged ones first; clean ones, half of them at random
    and half by the same ranking, because a detector should be seen where it fails, too."""
    order = _ranking(scan, judged)
    poisoned, clean = (order[scan.is_poisoned[order] == side] for side in (True, False))
    hardest = clean[: num // 2]
    rest = clean[num // 2 :]
    drawn = np.random.default_rng(seed).choice(rest, min(num - len(hardest), len(rest)), replace=False)
    return {"poisoned": poisoned[:num].tolist(), "clean": [*sorted(drawn.tolist()), *hardest.tolist()]}


def _ranking(scan: Scan, judged: str) -> NDArray[np.int64]:
    """Rows that have a score: flagged ones first, then by score, equal ones by id."""
    score = scan.table[judged].to_numpy(zero_copy_only=False).astype(np.float64)
    flagged = scan.table["flagged"].fill_null(False).to_numpy(zero_copy_only=False)
    order = np.lexsort((-score, ~flagged))  # stable, and rows are sorted by id
    return order[scan.is_scored[order]]


def _read_images(scan: Scan, rows: list[int], settings: ScoreConfig, size_px: int) -> list[np.ndarray]:
    """Read a few samples back from their shards, as scoring decoded them."""
    shard, index = (scan.table[name].take(pa.array(rows)).to_pylist() for name in ("shard", "index"))
    images: dict[tuple[str, int], np.ndarray] = {}
    for one in list_shards(settings.shards):
        wanted = {i for name, i in zip(shard, index, strict=True) if name == one.name}
        if not wanted:
            continue
        with open_shard(one) as stream:
            for sample in iter_samples(stream, settings.limits):
                if sample.index in wanted and sample.image is not None:
                    images[one.name, sample.index] = decode_image(sample.image, settings.limits, size_px)
                if sample.index >= max(wanted):
                    break
    lost = [place for place in zip(shard, index, strict=True) if place not in images]
    if lost:
        raise Mistake(f"{len(lost)} samples of the manifest are no longer in its shards, such as number {lost[0]}")
    return [images[place] for place in zip(shard, index, strict=True)]


def _hide(image_BCHW: torch.Tensor, mask_BL: torch.Tensor, patch_px: int) -> torch.Tensor:
    """Paint hidden patches grey; patches are numbered row by row."""
    side = image_BCHW.shape[-1] // patch_px
    hidden_B1HW = mask_BL.view(-1, 1, side, side).repeat_interleave(patch_px, 2).repeat_interleave(patch_px, 3)
    return torch.where(hidden_B1HW, torch.tensor(0.55), image_BCHW)


# --------------------------------------------------------------------------------------------------------- figures

# Poisoned and clean keep their colours everywhere: Okabe & Ito's vermillion and blue, distinct to all eyes.
# On the page each colour becomes the CSS variable of its name, so that figures follow light and dark mode.
INK = {"ink": "#1c2128", "muted": "#6b7480", "line": "#d9dee4", "poisoned": "#d55e00", "clean": "#0072b2"}
INK |= {"second": "#008f68", "third": "#a2559c", "fourth": "#8c6d1f"}
STYLE: Any = {
    "font.size": 9, "axes.edgecolor": INK["line"], "axes.labelcolor": INK["ink"], "axes.titlesize": 10,
    "axes.titlecolor": INK["ink"], "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "xtick.color": INK["muted"], "ytick.color": INK["muted"], "text.color": INK["ink"], "grid.color": INK["line"],
    "grid.linewidth": 0.6, "legend.frameon": False, "svg.fonttype": "none", "figure.dpi": 100, "savefig.dpi": 160,
}  # fmt: skip


def _displayed(scan: Scan, metrics: Numbers, most: int = 4) -> list[str]:
    """Scores for the figures, the judged one first; of those that order the samples alike, one. The table has all."""
    shown: list[str] = []
    for name in [name for name, row in metrics["scores"].items() if not row["is_control"]]:
        alike = (stats.spearmanr(scan.scores(name)[0], scan.scores(other)[0]).statistic for other in shown)
        if len(shown) < most and not any(value > 0.9999 for value in alike):
            shown.append(name)
    return shown


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    def styled(*arguments: Any) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*arguments)

    return styled


@_styled
def _draw_roc(scan: Scan, metrics: Numbers) -> Figure:
    """ROC curves, whole and at low FPR; victim solid, honest victim dashed."""
    figure = Figure(figsize=(10, 4.3), layout="constrained")
    whole, low = figure.subplots(1, 2)
    _roc_axes(whole, scan, metrics, is_log=False)
    _roc_axes(low, scan, metrics, is_log=True)
    whole.legend(loc="lower right", fontsize=8)
    return figure


def _roc_axes(axes: Axes, scan: Scan, metrics: Numbers, is_log: bool) -> None:
    names = _displayed(scan, metrics)
    least = 0.5 / max(1, metrics["counts"]["clean"])  # where FPR 0 is drawn on a logarithmic axis
    for name, colour in zip(names, ("ink", "second", "third", "fourth"), strict=False):
        for role, dash in (("victim", "-"), ("honest", (0, (3, 2)))):
            if metrics["scores"][name][role] is not None:
                fpr, tpr = roc_curve(*scan.scores(name, role))
                label = f"{name}  {number_text(metrics['scores'][name][role]['auroc'])}" + ", honest" * (
                    role == "honest"
                )
                fpr = np.maximum(fpr, least) if is_log else fpr
                axes.plot(fpr, tpr, color=INK[colour], linestyle=dash, linewidth=1.8, label=label)
    chance = np.geomspace(least, 1, 60) if is_log else np.array([0, 1])
    axes.plot(chance, chance, color=INK["muted"], linewidth=0.8, linestyle=":")
    if is_log:
        axes.set_xscale("log")
    axes.set_xlim(least if is_log else -0.01, 1)
    axes.set_ylim(-0.01, 1.01)
    axes.grid(True)
    axes.set_title("The same at low FPR, where a corpus is scanned" if is_log else "ROC: victim solid, honest dashed")
    axes.set_xlabel("false positive rate" + ", logarithmic" * is_log)
    axes.set_ylabel("true positive rate")


@_styled
def _draw_histograms(scan: Scan, metrics: Numbers) -> Figure:
    """How each score spreads over clean and poisoned samples, victim beside honest victim."""
    names = _displayed(scan, metrics) + ["dede_null"] * ("dede_null" in metrics["scores"])
    roles = ["victim"] if scan.honest is None else ["victim", "honest"]
    figure = Figure(figsize=(10, 0.5 + 1.75 * max(1, len(names))), layout="constrained")
    grid = figure.subplots(len(names), len(roles), squeeze=False, sharex="row") if names else np.empty((0, 0))
    for name, line in zip(names, grid, strict=True):
        values = np.concatenate([scan.scores(name, role)[0] for role in roles])
        least, most = np.quantile(values, [0.002, 0.998]) if values.size else (0, 1)
        edges = np.linspace(least, max(most, least + 1e-9), 41)
        for axes, role in zip(line, roles, strict=True):
            scores, poisoned = scan.scores(name, role)
            for kind, group in (("clean", scores[~poisoned]), ("poisoned", scores[poisoned])):
                share = np.full(group.size, 1 / max(1, group.size))
                style = {"bins": edges, "weights": share, "color": INK[kind]}
                axes.hist(group.clip(edges[0], edges[-1]), alpha=0.3, **style)
                axes.hist(group.clip(edges[0], edges[-1]), histtype="step", linewidth=1.3, label=kind, **style)
            threshold = metrics["decision"].get("threshold")
            if name == metrics["decision"]["score"] and role == "victim" and threshold is not None:
                axes.axvline(threshold, color=INK["ink"], linewidth=1, linestyle="--", label="threshold")
            axes.set_title(f"{name}, {'victim' if role == 'victim' else 'honest victim'}", fontsize=9)
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
    if names:
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(labels))
        figure.supylabel("share of each group", fontsize=9, color=INK["muted"])
    return figure


@_styled
def _draw_gallery(gallery: Gallery) -> Figure:
    """Poisoned samples beside clean ones."""
    num_rows = max(1, *(len(group) for group in gallery.values()))
    figure = Figure(figsize=(11, 0.8 + 1.05 * num_rows), layout="constrained")
    _gallery_axes(figure, gallery, num_rows)
    return figure


@_styled
def _draw_overview(scan: Scan, metrics: Numbers, gallery: Gallery) -> Figure:
    """One picture for a README: a few rows of the gallery, and the ROC."""
    figure = Figure(figsize=(14, 3.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[2.9, 1], wspace=0.03)  # type: ignore[misc]
    few = {group: [*members][:3] for group, members in gallery.items()}
    _gallery_axes(left, few, 3)
    axes = right.subplots()
    _roc_axes(axes, scan, metrics, is_log=False)
    axes.legend(loc="lower right", fontsize=7.5)
    return figure


def _gallery_axes(figure: Figure | SubFigure, gallery: Gallery, num_rows: int) -> None:
    parts: Any = figure.subfigures(1, len(gallery), wspace=0.06)
    for part, (group, members) in zip(parts, gallery.items(), strict=True):
        part.suptitle(f"{group} samples", color=INK[group], fontweight="bold", fontsize=11)
        grid = part.subplots(num_rows, len(COLUMNS), squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for line, exhibit in zip(grid, members, strict=False):
            for axes, name in zip(line, COLUMNS, strict=True):
                if name in exhibit.pictures:
                    axes.imshow(exhibit.pictures[name], interpolation="nearest")
        for axes, title in zip(grid[0], COLUMNS.values(), strict=True):
            axes.set_title(
                title.replace(" with", "\nwith").replace(" decoder", "\ndecoder"), fontsize=7.5, loc="center"
            )


def _as_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="png", facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _as_svg(figure: Figure, name: str) -> str:
    """Inline SVG in the page's own font and colours."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' id="[a-z0-9.]+_\d+"', "", svg)  # two figures on one page must not share ids
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"|<svg height="[^"]*"', r"<svg \1", svg, count=1)
    for variable, colour in INK.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg


# ------------------------------------------------------------------------------------------------------------ page


def _text(content: Any) -> str:
    """Text from strangers, as text: escaped, and its writing direction kept to itself."""
    return f"<bdi>{escape(str(content).encode('utf-8', 'replace').decode())}</bdi>"


def _verdict_section(metrics: Numbers) -> str:
    decision, counts, gate = metrics["decision"], metrics["counts"], metrics["gate"]
    found, flagged = decision["num_flagged_poisoned"], decision["num_flagged"]
    tiles = [_tile("flagged", f"{flagged:,}", f"of {counts['samples']:,} samples scanned", "")]
    tiles += (
        []
        if metrics["void"]
        else [
            _tile("of these, poisoned", f"{found:,}", _of_the_list(decision), "poisoned"),
            _tile(
                "of all poisoned, found",
                _percent(decision["recall"]),
                f"{found:,} of {_num_scored_poisoned(counts):,}",
                "poisoned",
            ),
        ]
    )
    for head, one in gate["victim"].items():
        control = (gate["honest"] or {}).get(head)
        beside = f"honest victim {_percent(control['asr'])}" if control else "no honest victim"
        beside += f"<br>clean accuracy {_percent(one['ca'])}" + (
            f", honest {_percent(control['ca'])}" if control else ""
        )
        tiles.append(_tile(f"attack success, {head.replace('_', '-')}", _percent(one["asr"]), beside, ""))
    void = ""
    if metrics["void"]:
        void = (
            f'<p class="void" role="alert"><strong>Void: {escape(metrics["void"])}.</strong> The victim does not pass '
            f"its activation gate: {REFUSED}.</p>"
        )
    about, attack = "", metrics.get("attack")
    if attack:
        about = (
            f"<p>The corpus was poisoned on purpose: a {escape(attack['trigger'])} trigger on {counts['poisoned']:,} "
            f"samples ({counts['poisoned'] / max(1, counts['samples']):.2%}), to make the encoder take every triggered "
            f"image for {_text(attack['target'])}. The detector does not know this.</p>"
        )
    word = "is backdoored" if gate["passes"] else "did not pass the activation gate"
    decided = "" if metrics["void"] else f" Decision: {escape(decision_in_words(metrics))}."
    return f"""
<section aria-labelledby="verdict">
<h2 id="verdict">The verdict</h2>{void}
<p class="lead">{_headline(metrics)}</p>{_mode(metrics["decision"])}{about}
<div class="tiles">{"".join(tiles)}</div>
<p class="small">The victim <strong>{word}</strong>: {escape(gate["reason"])}. CA is the accuracy on clean test images,
ASR the share of triggered test images taken for the target.{decided}</p>
</section>"""


def _headline(metrics: Numbers) -> str:
    decision, counts = metrics["decision"], metrics["counts"]
    words = f"{decision['num_flagged']:,} of {counts['samples']:,} samples are flagged"
    q = decision["declared"].get("q")
    if q is not None and decision["certified"]:
        words += f", with a declared false-discovery rate of at most {q:.0%}"
    elif q is not None:
        words += "; no error rate can be promised for this list"
    else:
        words += f" by the rule &ldquo;{escape(rule_text(decision))}&rdquo;, which promises no error rate for the list"
    if decision["num_flagged"] and not metrics["void"]:
        num_clean = decision["num_flagged"] - decision["num_flagged_poisoned"]
        words += (
            f". <strong>{decision['num_flagged_poisoned']:,} of them are poisoned</strong>, {num_clean:,} are clean "
            f"({_percent(decision['false_discovery_proportion'])})"
        )
        if said := promise_in_words(metrics):
            words += f". {escape(said)}"
    return words + "."


def _mode(decision: Numbers) -> str:
    """What kind of list it is, and what audits say of it."""
    mode = decision.get("mode")
    if mode not in MODES:
        return ""
    audits = [one["said"] for one in decision.get("audit", {}).values() if one["num_looked_at"]]
    lines = [f"The list is <strong>{mode}</strong>: {escape('; '.join([MODES[mode], *audits]))}."]
    lines += [f"<strong>Warning:</strong> {_text(one)}." for one in decision.get("calibration", {}).get("warnings", ())]
    return "".join(f'\n<p class="small">{line}</p>' for line in lines)


def _of_the_list(decision: Numbers) -> str:
    realised = decision["false_discovery_proportion"]
    return f"{share_text(realised)} of the list is clean" if decision["num_flagged"] else "the list is empty"


def _num_scored_poisoned(counts: Numbers) -> int:
    return counts["poisoned"] - counts["unreadable_poisoned"]


def _percent(interval: Numbers) -> str:
    return "–" if interval["value"] is None else f"{interval['value']:.1%}"


def _tile(name: str, value: str, beside: str, kind: str) -> str:
    return f'<div class="tile {kind}"><span>{name}</span><strong>{value}</strong><span>{beside}</span></div>'


def _trust_section(metrics: Numbers) -> str:
    rows = []
    for name, row in metrics["scores"].items():
        judged = name == metrics["decision"]["score"]
        mark = (
            ' <span class="tag">decides</span>' if judged else ' <span class="tag">control</span>' * row["is_control"]
        )
        cells = [auroc_text(row["victim"]), auroc_text(row["honest"]), difference_text(row["difference"])]
        cells += [
            number_text(row["victim"][key]) for key in ("average_precision", "tpr_at_fpr_1pct", "tpr_at_fpr_0_1pct")
        ]
        rows.append(
            f'<tr{" class=control" * row["is_control"]}><th scope="row"><code>{escape(name)}</code>{mark}</th>'
            f"<td>{_forest(row)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        )
    certified = ""
    if metrics["decision"]["certified"]:
        certified = (
            "<dt>Certified</dt><dd>There were enough clean calibration samples to keep the declared rate, if they "
            "resemble the clean samples of the corpus.</dd>"
        )
    return f"""
<section aria-labelledby="trust">
<h2 id="trust">Can you trust this number?</h2>
<p>{" ".join(escape(sentence) for sentence in reading(metrics))}</p>
<div class="wide"><table>
<thead><tr><th scope="col">score</th><th scope="col">AUROC, 0 to 1<br><span class="small">● victim ○ honest</span></th>
<th scope="col">victim</th><th scope="col">honest victim</th><th scope="col">difference</th>
<th scope="col"><abbr title="average precision; its floor is the poison rate">AP</abbr></th>
<th scope="col"><abbr title="share of the poisoned found when 1 % of the clean are flagged">TPR at FPR 1%</abbr></th>
<th scope="col"><abbr title="the same at 0.1 %; needs 1,000 clean samples">at 0.1%</abbr></th></tr></thead>
<tbody>{"".join(rows)}</tbody></table></div>
<details><summary>What these words mean</summary><dl>
<dt>AUROC</dt><dd>How often a poisoned sample scores higher than a clean one: 1 is perfect, 0.5 is guessing.
Brackets hold 95% intervals.</dd>
<dt>Honest victim</dt><dd>The same architecture trained without poison, with a decoder of its own, scoring the very same
images. A stamp looks odd to any model; only what the victim adds to that is the backdoor.</dd>
<dt>Control</dt><dd>A score that never sees the victim. <code>dede_null</code> is the decoder without an embedding,
<code>stat_…</code> are simple measurements of the pixels. An AUROC far from 0.5, on either side, means that the stamp
alone tells the samples apart.</dd>
<dt>False-discovery rate</dt><dd>The share of a list that is clean, on average. Declared before scoring; the realised
proportion of this one list may lie above or below it.</dd>
{certified}</dl></details>
</section>"""


def _forest(row: Numbers) -> str:
    """AUROC and interval of victim and honest victim, on one line from 0 to 1."""
    marks = []
    for y, role, fill in ((7, "victim", "var(--ink)"), (17, "honest", "var(--paper)")):
        one = row[role]
        if one is not None and one["auroc"] is not None:
            low, value, high = (6 + 148 * one[key] for key in ("auroc_low", "auroc", "auroc_high"))
            marks.append(
                f'<path d="M{low:.1f} {y}H{high:.1f}" stroke="var(--ink)" stroke-width="1.5"/>'
                f'<circle cx="{value:.1f}" cy="{y}" r="4" fill="{fill}" stroke="var(--ink)" stroke-width="1.5"/>'
            )
    label = f"AUROC {auroc_text(row['victim'])} with the victim, {auroc_text(row['honest'])} with the honest victim"
    return (
        f'<svg class="forest" viewBox="0 0 160 24" role="img" aria-label="{label}">'
        '<path d="M6 0V24M154 0V24" stroke="var(--line)"/>'
        '<path d="M80 0V24" stroke="var(--muted)" stroke-dasharray="2 2"/>' + "".join(marks) + "</svg>"
    )


def _figure_section(figures: Mapping[str, str]) -> str:
    captions = {
        "roc": "What share of the poisoned samples is found (upwards) for what share of the clean ones flagged by "
        "mistake (to the right). Solid with the victim, dashed with the honest victim, dotted is guessing.",
        "histograms": "How the scores spread. A detector of the backdoor pulls the two colours apart on the left and "
        "leaves them together on the right, with the honest victim.",
    }
    drawn = [
        f'<figure class="chart">{_labelled(svg, captions[name])}<figcaption>{captions[name]}</figcaption></figure>'
        for name, svg in figures.items()
    ]
    return f'\n<section aria-labelledby="curves"><h2 id="curves">Curves</h2>{"".join(drawn)}</section>'


def _labelled(svg: str, label: str) -> str:
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def _gallery_section(scan: Scan, metrics: Numbers, gallery: Gallery) -> str:
    groups = []
    for group, members in gallery.items():
        heads = "".join(f"<span>{title}</span>" for title in COLUMNS.values())
        rows = "".join(_exhibit(scan, metrics, exhibit) for exhibit in members)
        groups.append(
            f'<div><h3 class="{group}">{group} samples</h3><div class="strip heads">{heads}</div>{rows}</div>'
        )
    first = next((exhibit for members in gallery.values() for exhibit in members), None)
    if first is None:
        return ""
    seen = f"{first.num_visible} of {first.num_patches} patches and" if first.num_visible else "no patch, only"
    return f"""
<section aria-labelledby="gallery">
<h2 id="gallery">What the decoder makes of them</h2>
<p>The decoder sees {seen} the victim&rsquo;s embedding, and rebuilds the rest. An embedding that describes its own
image helps; one that was hijacked describes something else. The fourth picture is rebuilt without the embedding. Bright
in the last one is a large error, on one scale for all. Poisoned samples are the highest scores; of the clean ones the
first half is drawn at random and the second half has the highest scores, where false alarms come from.</p>
<div class="groups">{"".join(groups)}</div>
</section>"""


def _exhibit(scan: Scan, metrics: Numbers, exhibit: Exhibit) -> str:
    row = scan.table.slice(exhibit.row, 1).to_pylist()[0]
    caption = scan.captions[exhibit.row]
    tiles = "".join(
        f'<img src="{_data_url(exhibit.pictures[name])}" alt="{title}">'
        if name in exhibit.pictures
        else "<span>–</span>"
        for name, title in COLUMNS.items()
    )
    scores = ", ".join(
        f"{escape(name)} {_short(row[name])}" for name, one in metrics["scores"].items() if not one["is_control"]
    )
    mark = '<span class="tag">flagged</span> ' if row["flagged"] else ""
    return (
        f'<figure class="exhibit"><div class="strip">{tiles}</div>'
        f"<figcaption>{mark}<code>{_text(row['sample_id'])}</code>"
        f"{f' &ldquo;{_text(_clip(caption))}&rdquo;' if caption else ''}<br>{scores}</figcaption></figure>"
    )


def _data_url(image_HWC: np.ndarray, most_px: int = 160) -> str:
    image = Image.fromarray(image_HWC)
    if image.width > most_px:
        image = image.resize((most_px, most_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _clip(text: str, length: int = 120) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _short(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.4g}"


def _list_section(scan: Scan, metrics: Numbers, length: int = 50) -> str:
    judged = metrics["decision"]["score"]
    top = _ranking(scan, judged)[:length]
    lines = []
    for place, row in enumerate(top.tolist(), 1):
        one, caption = scan.table.slice(row, 1).to_pylist()[0], scan.captions[row]
        truth = "poisoned" if scan.is_poisoned[row] else "clean"
        lines.append(
            f'<tr><td>{place}</td><th scope="row"><code>{_text(one["sample_id"])}</code></th>'
            f"<td>{_short(one[judged])}</td><td>{_short(one['p_value'])}</td>"
            f"<td>{'flagged' if one['flagged'] else '–'}</td>"
            f'<td class="{truth}">{truth}</td><td>{_text(_clip(caption, 60)) if caption else ""}</td></tr>'
        )
    return f"""
<section aria-labelledby="list">
<h2 id="list">The {len(lines)} most suspicious samples</h2>
<p>In the manifest&rsquo;s order: flagged first, then by <code>{escape(judged)}</code>. Truth comes from the attack, not
from the detector.</p>
<div class="wide"><table><thead><tr><th scope="col"></th><th scope="col">sample</th><th scope="col">score</th>
<th scope="col">p-value</th><th scope="col">decision</th><th scope="col">truth</th><th scope="col">caption</th></tr>
</thead>
<tbody>{"".join(lines)}</tbody></table></div>
</section>"""


def _made_section(metrics: Numbers) -> str:
    counts = metrics["counts"]
    unreadable = ", ".join(f"{escape(reason)} {num:,}" for reason, num in counts["unreadable"].items()) or "none"
    made, parts = metrics["made"], []
    for role in [role for role in ("victim", "honest") if role in made]:
        victim = made[role]["victim"]
        name = "victim" if role == "victim" else "honest victim"
        parts.append(f"<dt>{name}</dt><dd>{_text(victim['path'])} {_fingerprint(victim['fingerprint'])}</dd>")
        detectors = (f"{escape(kind)} {_fingerprint(one)}" for kind, one in made[role]["detectors"].items())
        parts.append(f"<dt>its detectors</dt><dd>{', '.join(detectors)}</dd>")
    versions = ", ".join(f"{escape(name)} {escape(version)}" for name, version in made["victim"]["versions"].items())
    settings = {"scoring": made["victim"]["settings"], "evaluation": made["settings"]}
    return f"""
<section aria-labelledby="made">
<h2 id="made">How this was made</h2>
<dl><dt>samples</dt><dd>{counts["samples"]:,} in the manifest, {counts["scored"]:,} scored by both victims</dd>
<dt>unreadable</dt><dd>{unreadable} ({counts["unreadable_poisoned"]:,} of them poisoned); without a score</dd>
{"".join(parts)}<dt>versions</dt><dd>{versions}</dd></dl>
<details><summary>Settings</summary><pre>{escape(json.dumps(settings, indent=2, ensure_ascii=False))}</pre></details>
</section>"""


def _fingerprint(full: str) -> str:
    return f'<code title="{escape(full)}">{escape(full[:16])}</code>'


LIGHT = "--paper:#ffffff;--panel:#f5f7f9;--void:#b3261e;" + "".join(
    f"--{name}:{colour};" for name, colour in INK.items()
)
DARK = (
    "--paper:#14171b;--panel:#1d2228;--void:#ff8a80;--ink:#e8ebee;--muted:#98a2ad;--line:#363d45;--poisoned:#ff9248;"
    "--clean:#5ab4ec;--second:#2fc79a;--third:#dd9ad8;--fourth:#d8b65a;"
)
STYLE_SHEET = (
    f":root{{color-scheme:light dark;{LIGHT}}}\n@media (prefers-color-scheme:dark){{:root{{{DARK}}}}}"
    """
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,"Segoe UI",sans-serif}
header,main{max-width:1120px;margin:0 auto;padding:0 24px}
header{padding-top:40px}
h1{font-size:30px;line-height:1.2;margin:0}
h2{font-size:22px;margin:56px 0 8px}
h3{font-size:16px;margin:16px 0 6px}
p,dl,figcaption{max-width:78ch}
.lead{font-size:20px;line-height:1.45}
.small,figcaption,details,.tile span,.heads{font-size:13.5px;color:var(--muted)}
h3.poisoned,td.poisoned,.tile.poisoned strong{color:var(--poisoned)}
h3.clean,td.clean,.tile.clean strong{color:var(--clean)}
.void{background:var(--void);color:var(--paper);padding:14px 18px;border-radius:8px;font-size:18px;max-width:none}
.small{max-width:110ch}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:12px;margin:20px 0}
.tile{background:var(--panel);border-radius:10px;padding:14px 16px;display:flex;flex-direction:column}
.tile strong{font-size:30px;line-height:1.25;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums;width:100%}
th,td{text-align:left;padding:6px 12px 6px 0;border-bottom:1px solid var(--line);white-space:nowrap;font-weight:400}
thead th{color:var(--muted);vertical-align:bottom}
tr.control{color:var(--muted)}
td:last-child{white-space:normal}
code,pre{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{overflow:auto;background:var(--panel);padding:14px;border-radius:8px}
.tag{font-size:11.5px;border:1px solid currentColor;border-radius:9px;padding:0 7px;color:var(--muted)}
.forest{width:160px;height:24px;display:block}
figure{margin:16px 0}
.chart{overflow-x:auto}
.chart svg{width:100%;min-width:640px;height:auto;display:block}
.chart svg text{font-family:inherit!important}
.groups{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:8px 40px}
.strip{display:grid;grid-template-columns:repeat(5,1fr);gap:6px}
.strip img{width:100%;aspect-ratio:1;image-rendering:pixelated;border-radius:4px;background:var(--panel)}
.heads{line-height:1.25;align-items:end}
.exhibit{margin:6px 0 16px}
.exhibit figcaption{overflow-wrap:anywhere;margin-top:4px}
dt{font-weight:600;margin-top:8px}
dd{margin:0;overflow-wrap:anywhere}
summary{cursor:pointer;margin:14px 0}
footer{height:64px}"""
)
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>dede_ray: poisoned samples</title>
<style>
{style}
</style>
</head>
<body>
<header>
<h1>Poisoned samples behind a vision encoder</h1>
<p class="small">Which training samples carry a backdoor trigger? Scored by dede_ray, compared with the truth.</p>
</header>
<main>{sections}
</main>
<footer></footer>
</body>
</html>
"""

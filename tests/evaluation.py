"""A small planted world to evaluate: what the tests of the numbers and of the page share."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dede_ray.attacks.poison import PoisonConfig
from dede_ray.attacks.triggers import Patch
from dede_ray.clip import build_clip, save_clip
from dede_ray.config import write_json
from dede_ray.decisions import Conformal
from dede_ray.decoder import DecoderShape, MaskedDecoder, save_decoder
from dede_ray.detectors.dede import DeDe
from dede_ray.detectors.statistics import ImageStatistics
from dede_ray.manifest import write_manifest
from dede_ray.report import EvaluateConfig
from dede_ray.scoring import ScoreConfig
from dede_ray.shards import Sample, encode_image, list_shards, sample_id, write_shards
from dede_ray.victims import OpenClipVictim, load_victim

EVIL = '<script>alert("x")</script> & <img src=x onerror=alert(1)>'  # a caption
EVIL_KEY = "010<b onclick=x>"
SCORES = ["dede_sum", "dede_mean", "dede_null_ratio", "dede_null", "stat_contrast", "stat_edges"]
CONTROLS = ["dede_null", "stat_contrast", "stat_edges"]
NUM, NUM_POISONED, UNREADABLE = 80, 16, 5
KEYS = [EVIL_KEY if i == 10 else f"{i:03d}" for i in range(NUM)]
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
TRIGGER = Patch(size_px=6, pattern="white")
LENIENT = {"min_asr": 0, "min_asr_gain": 0, "max_ca_loss": 1}  # lets even two random victims through


def plant(folder):
    """Poisoned shards, their truth, and two scored victims: the planted scores see poison with the first only.

    Both victims are random, so the usual activation gate must refuse them.
    """
    rng = np.random.default_rng(0)
    is_poisoned = np.arange(NUM) % 5 == 0
    samples = []
    for i in range(NUM):
        image_HWC = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        image_HWC = TRIGGER.stamp(image_HWC) if is_poisoned[i] else image_HWC
        caption = EVIL if i == 0 else f"a photo of {i}"
        image = b"no image" if i == UNREADABLE else encode_image(image_HWC, "png")
        samples.append(Sample(KEYS[i], i, image=image, image_suffix="png", caption=caption, label=i % 2))
    write_shards(folder / "poisoned", "train", samples, NUM // 2)
    for split, others in (("test", samples[1:40]), ("probe", samples[40:])):
        write_shards(folder / "clean", split, others, 100)
    write_json(folder / "clean" / "classes.json", {"names": ["cat", "dog"], "templates": ["a photo of a {}"]})
    attack = PoisonConfig(shards="clean", output="poisoned", trigger=TRIGGER, rate=0.2, target_label=1)
    write_json(folder / "poisoned" / "run.json", {"settings": attack.model_dump(mode="json")})
    ids = [sample_id(f"train-{i // (NUM // 2):05d}.tar", KEYS[i]) for i in range(NUM)]
    captions = pa.array([sample.caption for sample in samples])
    truth = {"sample_id": ids, "is_poisoned": is_poisoned, "caption": captions}
    truth["poisoned_caption"] = pa.array([EVIL if i == 0 else None for i in range(NUM)], pa.string())
    pq.write_table(pa.table(truth), folder / "truth.parquet")
    for seed, name in enumerate(("victim", "honest")):
        _score(folder, name, seed, ids, samples, is_poisoned & (name == "victim"))


def _score(folder, name, seed, ids, samples, is_seen):
    torch.manual_seed(seed)
    described = {"model_cfg": TINY, "preprocess_cfg": {}}
    save_clip(folder / name, build_clip(described), described)
    victim = load_victim(OpenClipVictim(path=str(folder / name)))
    shape = DecoderShape(patch_px=8, width=12, heads=3, encoder_depth=1, decoder_depth=1)
    decoder = MaskedDecoder(shape, victim.image_size, victim.embedding_dim)
    decoder.victim, decoder.has_null = victim.fingerprint, True
    save_decoder(folder / f"{name}_decoder", decoder, {})
    config = ScoreConfig(
        shards=str(folder / "poisoned"),
        output=str(folder / f"{name}_scores"),
        victim=OpenClipVictim(path=str(folder / name)),
        detectors=[DeDe(decoder=str(folder / f"{name}_decoder"), score_mask_ratio=0.75), ImageStatistics()],
        decision=Conformal(q=0.2, score="dede_null_ratio"),
    )
    rng = np.random.default_rng(seed)
    columns = {score: rng.normal(size=NUM).astype(np.float32) for score in SCORES}
    columns["dede_null_ratio"] += 3 * is_seen
    for column in columns.values():
        column[UNREADABLE] = np.nan
    verdict = config.decision.decide(columns["dede_null_ratio"], rng.normal(size=500), ids)
    rows = {
        "sample_id": ids,
        "content_hash": [sample.content_hash() for sample in samples],
        "shard": [one.split("/")[0] for one in ids],
        "index": [i % (NUM // 2) for i in range(NUM)],
        **{score: pa.array(column, pa.float32(), from_pandas=True) for score, column in columns.items()},
        "p_value": pa.array(verdict.p_value, from_pandas=True),
        "flagged": verdict.flagged,
        "error": pa.array(["image_unreadable" if i == UNREADABLE else None for i in range(NUM)]),
    }
    info = {
        "settings": config.model_dump(mode="json", exclude={"resources"}),
        "victim": {"path": str(folder / name), "fingerprint": victim.fingerprint},
        "detectors": {"dede": "0" * 64},
        "versions": {"torch": torch.__version__},
        "score_columns": SCORES,
        "controls": CONTROLS,
        "decision": verdict.report,
    }
    written = pa.table(rows)
    shards = [shard.name for shard in list_shards(config.shards)]
    parts = [(shard, written.filter(pa.compute.equal(written["shard"], shard))) for shard in shards]
    write_manifest(Path(config.output), parts, info)


def config(world, **changed):
    settings = {
        "manifest": world / "victim_scores",
        "honest_manifest": world / "honest_scores",
        "truth": world / "truth.parquet",
        "attack": world / "poisoned",
        "test_shards": world / "clean" / "test-*.tar",
        "probe_shards": world / "clean" / "probe-*.tar",
        "output": world / "report",
    }
    nested = {name: changed.pop(name) for name in ("gate",) if name in changed}
    settings = {name: value and str(value) for name, value in (settings | changed).items()}
    return EvaluateConfig.model_validate({"gate": LENIENT, **settings, **nested, "num_gallery": 3})

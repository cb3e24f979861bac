"""Fuzzing: real files, mutated. A shard gives samples and reasons or a Mistake, a config or a Mistake; nothing else.

By default a few hundred mutations of each kind, always the same ones. For longer, and different ones each time:

    DEDE_RAY_FUZZ_S=600 python -m pytest tests/end_to_end/test_fuzz.py -m slow
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import json
import os
import random
import re
import struct
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import save

from dede_ray.data.captions import read_classes
from dede_ray.data.images import decode_image
from dede_ray.data.shards import REASONS, BadSample, Limits, Shard, ShardEnd, iter_samples, list_shards
from dede_ray.data.tar import open_tar
from dede_ray.models.clip import build_clip, model_description
from dede_ray.models.weights import read_tensors
from dede_ray.runtime.cli import JOBS
from dede_ray.runtime.config import Config, Mistake, load, parse_json, read_json
from tests.benchmarks.chaos import ChaosConfig
from tests.benchmarks.scale import ScaleConfig
from tests.benchmarks.speed import SpeedConfig

LIMITS = Limits(max_pixels=4_000_000, max_member_bytes=1_000_000)
CONFIGS = Path(__file__).parents[2] / "configs"
KINDS: dict[str, type[Config]] = {
    "chaos": ChaosConfig,
    "scale": ScaleConfig,
    **{name: job.settings_class() for name, job in JOBS.items()}, "speed": SpeedConfig,
}  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """One of the seeds after some byte flips, cuts, repetitions and splices, also at the borders of tar blocks."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        if draw(st.booleans()):
            at = at // 512 * 512 + draw(st.sampled_from([0, 100, 124, 135, 148, 156, 157, 257, 345, 482, 511]))
        how = draw(st.integers(0, 6))
        length = draw(st.sampled_from([1, 2, 4, 12, 100, 512, 1024, 5000]))
        if how == 0:
            content[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif how == 1:
            content[at : at + length] = draw(st.binary(max_size=16))
        elif how == 2:
            del content[at : at + length]
        elif how == 3:
            content[at:at] = content[at : at + length] * draw(st.integers(1, 5))
        elif how == 4:
            other = draw(st.sampled_from(seeds))
            start = draw(st.integers(0, max(0, len(other) - 1))) // 512 * 512
            content[at : at + draw(st.sampled_from([0, length]))] = other[start : start + length]
        elif how == 5:
            content[at : at + length] = draw(st.sampled_from([b"\0", b"\xff", b"\x80", b"9", b" ", b"-1"])) * length
        else:
            del content[at:]
    return bytes(content)


def with_checksums(content: bytes) -> bytes:
    """Give every block that may be a tar header the checksum it needs to be taken for one."""
    fixed = bytearray(content)
    for at in range(0, len(fixed) - 511, 512):
        if fixed[at + 257 : at + 262] == b"ustar" or fixed[at + 156 : at + 157] in b"0LKSxg57":
            fixed[at + 148 : at + 156] = b" " * 8
            fixed[at + 148 : at + 156] = b"%06o\0 " % sum(fixed[at : at + 512])
    return bytes(fixed)


def small_tars() -> list[bytes]:
    """The hostile shards that are small, and a good one."""
    slow = ("bomb", "frames", "20000", "too_large", "huge", "60_mb")
    built = [case.build() for case in hostile.SHARDS if not any(word in case.name for word in slow)]
    return [hostile.GOOD, *[content for content in built if len(content) < 40_000]]


def small_images() -> list[bytes]:
    cases = [build for name, (_, build, _) in hostile.IMAGES.items() if "bomb" not in name and "frames" not in name]
    return [content for build in cases if len(content := build()) < 20_000]


TARS, IMAGES = small_tars(), small_images()


def check_shard(content: bytes) -> None:
    for name in ("s.tar", "s.tar.gz"):
        end, keys = ShardEnd(), []
        for sample in iter_samples(io.BytesIO(content), LIMITS, end=end, keep_others=name == "s.tar"):
            keys.append(sample.key.encode())
            assert sample.error is None or sample.error in REASONS
            if sample.error is None:
                check_image(sample.image or b"")
        assert end.num_samples == len(keys) == len(set(keys))
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        file.write(content)
        file.flush()
        try:
            list_shards(file.name)
        except Mistake:
            return
        # A header of names, say, with nothing behind it: only the first block was looked at.
        with open(file.name, "rb") as stream, contextlib.suppress(tarfile.ReadError):
            assert open_tar(stream).next() is not None


def check_image(content: bytes) -> None:
    try:
        assert decode_image(content, LIMITS, 32).shape == (32, 32, 3)
        assert decode_image(content, LIMITS).ndim == 3
    except BadSample:  # with a reason of the closed list, as its type says
        return


def check_json(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "classes.json").write_bytes(content)
        for reader in (
            lambda: parse_json(io.BytesIO(content)),
            lambda: read_json(f"{folder}/classes.json", "classes"),
            lambda: read_classes([Shard("a.tar", f"{folder}/a.tar", 0)]),
        ):
            try:
                reader()
            except ValueError:  # a Mistake is one
                continue


def check_tensors(content: bytes, suffix: str) -> None:
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(content)
        file.flush()
        try:
            tensors = read_tensors(file.name)
        except Mistake:
            return
        for tensor in tensors.values():
            assert tensor.untyped_storage().nbytes() <= len(content)
            tensor.view(-1)[:1000].double().sum() if tensor.is_contiguous() else tensor[..., :0].sum()


def load_yaml(kind: type[Config], text: str) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", errors="surrogatepass") as file:
        file.write(text)
        file.flush()
        with contextlib.suppress(Mistake):
            assert isinstance(load(kind, [file.name]), kind)


@functools.cache
def configs() -> list[tuple[type[Config], Any]]:
    texts = [path.read_text() for path in sorted(CONFIGS.rglob("*.yaml"))]
    jobs = [re.search(r"(?:dede-ray |jobs/)(\w+)", text) for text in texts]  # each opens with its command
    return [(KINDS[job[1]], yaml.safe_load(text)) for job, text in zip(jobs, texts, strict=True) if job]


odd_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from([10**400, -1, 2**63, "", "\0"]),
    st.lists(st.integers() | st.text(max_size=5), max_size=3),
    st.dictionaries(st.text(max_size=8), st.integers(), max_size=3),
    st.just({"kind": "nonsense"}),
    st.dates(),
    st.binary(max_size=5),
)


@st.composite
def edited(draw: st.DrawFn, content: Any) -> Any:
    """The settings with one value, at any depth, exchanged, added or left out."""
    if isinstance(content, dict) and content and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(content, key=str)))
        how = draw(st.integers(0, 9))
        if how == 0:
            return {name: value for name, value in content.items() if name != key}
        if how == 1:
            name = draw(st.text(max_size=9) | st.integers() | st.sampled_from(["kind", "seed"]))
            return {**content, name: draw(odd_values)}
        return {**content, key: draw(edited(content[key]))}
    if isinstance(content, list) and content and draw(st.booleans()):
        at = draw(st.integers(0, len(content) - 1))
        return [*content[:at], draw(edited(content[at])), *content[at + 1 :]]
    return draw(odd_values)


YAML_BITS = """
2024-13-45 | !!bool maybe | !!int x | !!timestamp x | &a [*a] | *a | !!python/object/apply:os.mkdir [x] | ? [a]: b
{ | [[[[ | <<: 1 | 0x | 1e999 | .nan | .inf | 1:60:99 | "\\ud800" | !!binary x | --- | !!set {a} | !!omap [a] | - -
"""
YAML_VALUES = [bit.strip() for line in YAML_BITS.strip().splitlines() for bit in line.split(" | ")]
YAML_VALUES += ["---\n", "\t", "9" * 5000, "[" * 3000, "- " * 500]


@st.composite
def broken_yaml(draw: st.DrawFn, text: str) -> str:
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        if draw(st.booleans()):  # in place of a value
            at = text.find(":", at) + 1
        new = draw(st.sampled_from(YAML_VALUES) | st.text(max_size=4))
        text = text[:at] + " " + new + text[at + draw(st.integers(0, 9)) :]
    return text


def fuzz_tars(data: st.DataObject) -> None:
    content = data.draw(mutated(TARS))
    if data.draw(st.booleans()):
        content = with_checksums(content)
    packed = data.draw(st.sampled_from(["no", "no", "whole", "damaged"]))
    if packed != "no":
        content = gzip.compress(content, 1)
    check_shard(data.draw(mutated([content])) if packed == "damaged" else content)


def fuzz_images(data: st.DataObject) -> None:
    check_image(data.draw(mutated(IMAGES)))


def fuzz_json(data: st.DataObject) -> None:
    seeds = [b'{"names": ["cat", "dog"], "templates": ["a photo of a {}"], "n": [1, 2.5, null, true, "\\u00e9"]}']
    check_json(data.draw(mutated(seeds) | st.binary(max_size=40)))


@functools.cache
def small_checkpoints() -> dict[str, bytes]:
    """By suffix: safetensors, torch's archive, and its older format, which names storages by their addresses."""
    state = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(5, dtype=torch.int64), "c": torch.tensor(1.0)}
    old = hostile.saved_by_torch(state, _use_new_zipfile_serialization=False)
    for number, address in enumerate(dict.fromkeys(re.findall(rb"X[\x06-\x20]\0\0\0(\d{6,})", old))):
        here = struct.pack("<I", len(address)) + address
        old = old.replace(here, struct.pack("<I", 9) + b"%09d" % number)
    return {".safetensors": save(state), ".pt": hostile.saved_by_torch(state), ".bin": old}


def fuzz_checkpoints(data: st.DataObject) -> None:
    suffix = data.draw(st.sampled_from(sorted(small_checkpoints())))
    check_tensors(data.draw(mutated([small_checkpoints()[suffix]])), suffix)


def fuzz_settings(data: st.DataObject) -> None:
    kind, content = data.draw(st.sampled_from(configs()))
    if data.draw(st.booleans()):
        text = yaml.safe_dump(data.draw(edited(content)), allow_unicode=data.draw(st.booleans()))
    else:
        text = data.draw(broken_yaml(yaml.safe_dump(content)))
    load_yaml(kind, text)


def fuzz_model_configs(data: st.DataObject) -> None:
    """No number in a model config makes open_clip build, rather than refuse, for long."""
    content = {
        "model_cfg": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
            "text_cfg": {"context_length": 8, "vocab_size": 512, "width": 16, "heads": 2, "layers": 1},
        },
        "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
    }
    changed = data.draw(edited(content))
    assume(isinstance(changed, dict) and changed != content)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.json"
        path.write_text(json.dumps(changed, default=str))
        (Path(folder) / "weights").write_bytes(bytes(1000))
        with contextlib.suppress(Mistake):
            build_clip(model_description(str(path)), weights=Path(folder) / "weights")


FUZZERS: dict[str, tuple[Callable[[st.DataObject], None], int]] = {
    "tars": (fuzz_tars, 300),
    "images": (fuzz_images, 500),
    "json": (fuzz_json, 200),
    "checkpoints": (fuzz_checkpoints, 300),
    "settings": (fuzz_settings, 300),
    "model_configs": (fuzz_model_configs, 60),
}


def fuzz(name: str, number: int | None = None) -> None:
    """Try a fuzzer's mutations: the same ones each time, or those of a number."""
    fuzzer, num = FUZZERS[name]
    checks = list(HealthCheck)

    @settings(max_examples=num, deadline=None, database=None, suppress_health_check=checks, derandomize=number is None)
    @given(st.data())
    def test(data: st.DataObject) -> None:
        fuzzer(data)

    (test if number is None else seed(number)(test))()


@pytest.fixture(autouse=True)
def nothing_runs():
    yield
    if hostile.SENTINEL.exists():
        hostile.SENTINEL.rmdir()
        pytest.fail("something of a mutated file was executed")


@pytest.mark.parametrize("name", FUZZERS)
def test_mutated_files_end_as_documented(name):
    fuzz(name)


@pytest.mark.slow
def test_mutated_files_end_as_documented_for_a_long_time():
    """Prints its seed; `DEDE_RAY_FUZZ_SEED` begins there again."""
    first = int(os.environ.get("DEDE_RAY_FUZZ_SEED") or random.SystemRandom().randrange(2**32))
    started, rounds = time.monotonic(), 0
    while time.monotonic() - started < float(os.environ.get("DEDE_RAY_FUZZ_S", "60")):
        for name in FUZZERS:
            print(f"seed {first + rounds}: {name}", flush=True)
            fuzz(name, first + rounds)
        rounds += 1
    print(f"{rounds} rounds of {sum(num for _, num in FUZZERS.values()):,} mutations")

"""Reference inputs: the images of the target class that BadEncoder and DRUPE push triggered images towards."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydantic import Field, model_validator

from dede_ray.data.images import decode_image
from dede_ray.data.images import to_square as as_square
from dede_ray.data.sampling import keyed_generator
from dede_ray.data.shards import BadSample, Limits, Sample, iter_samples, list_shards, open_shard, sample_id
from dede_ray.poisoning.triggers import Trigger
from dede_ray.runtime.config import Config, Mistake

MAX_REFERENCES = 10_000


class References(Config):
    """Where the reference inputs come from: `files`, or `shards` with either `sample_ids` or `num`."""

    files: list[str] | None = Field(None, min_length=1)
    """Image files, and .npz files whose `x` is uint8 (n, H, W, 3), as BadEncoder and DRUPE published theirs."""
    shards: str | list[str] | None = None
    """Labelled shards to take them from."""
    sample_ids: list[str] | None = Field(None, min_length=1)
    """Which samples of the shards."""
    num: int | None = Field(None, ge=1, le=MAX_REFERENCES)
    """So many samples of the target's class, drawn by the run's seed."""

    @model_validator(mode="after")
    def _comes_from_one_place(self) -> References:
        if (self.files is None) == (self.shards is None):
            raise ValueError("name either files, or shards")
        if self.shards is not None and (self.sample_ids is None) == (self.num is None):
            raise ValueError("with shards, name either sample_ids or num")
        return self

    def read(self, label: int, size_px: int, seed: int, limits: Limits) -> tuple[np.ndarray, list[str]]:
        """Read them as the encoder will see them.

        Args:
            label: the target's, which `num` draws from.
            size_px: side of the encoder's input.

        Returns:
            uint8 (n, size_px, size_px, 3), and a name for each: a file or a sample id.

        Raises:
            Mistake: a file that is missing, damaged or not what it should be, or too few samples.
        """
        if self.files is not None:
            named = [(name, image_HWC) for name in self.files for image_HWC in _read_file(Path(name), limits)]
        else:
            named = self._from_shards(label, seed, limits)
        if len(named) > MAX_REFERENCES:
            raise Mistake(f"{len(named):,} references are more than {MAX_REFERENCES:,}; name fewer")
        images = [as_square(image_HWC, size_px) for _, image_HWC in named]
        return np.stack(images), [name for name, _ in named]

    def _from_shards(self, label: int, seed: int, limits: Limits) -> list[tuple[str, np.ndarray]]:
        assert self.shards is not None
        wanted = None if self.sample_ids is None else set(self.sample_ids)
        found: dict[str, bytes] = {}
        for name, sample in _samples(self.shards, limits):
            if sample.image is not None and (sample.label == label if wanted is None else name in wanted):
                found[name] = sample.image
        if wanted is not None and (missing := sorted(wanted - found.keys())):
            raise Mistake(f"no usable sample {missing[0]} in {self.shards} ({len(missing)} of them are missing)")
        # The same ones in whatever order the shards come; unreadable images are passed over where they are drawn.
        names = self.sample_ids or sorted(found, key=lambda name: keyed_generator(seed, name).random())
        images: list[tuple[str, np.ndarray]] = []
        for name in names:
            try:
                images.append((name, decode_image(found[name], limits)))
            except BadSample as bad:
                if wanted is not None:
                    raise Mistake(f"the reference {name} cannot be used: {bad.reason}") from None
            if len(images) == self.num:
                return images
        if wanted is None:
            raise Mistake(f"{self.shards} has {len(images)} usable samples of class {label}, not {self.num}")
        return images


class Target(Config):
    """One backdoor: a trigger, and the reference inputs that triggered images are embedded next to."""

    trigger: Trigger
    label: int = Field(ge=0)
    """The downstream class that the references are of."""
    references: References


def _samples(shards: str | list[str], limits: Limits) -> Iterator[tuple[str, Sample]]:
    for shard in list_shards(shards):
        with open_shard(shard) as stream:
            for sample in iter_samples(stream, limits):
                if sample.error is None:
                    yield sample_id(shard.name, sample.key), sample


def _read_file(path: Path, limits: Limits) -> list[np.ndarray]:
    if not path.is_file():
        raise Mistake(f"no reference file at {path} (looked from {Path.cwd()})")
    if path.suffix == ".npz":
        return list(_read_npz(path, limits))
    if path.stat().st_size > limits.max_member_bytes:
        raise Mistake(f"the reference {path} is longer than limits.max_member_bytes {limits.max_member_bytes:,}")
    try:
        return [decode_image(path.read_bytes(), limits)]
    except BadSample as bad:
        raise Mistake(f"the reference {path} is no image that can be used: {bad.reason}") from None


def _read_npz(path: Path, limits: Limits) -> np.ndarray:
    """The `x` of a reference file, read by hand: the header is believed only as far as the bytes bear it out."""
    expected = f"expected an .npz file whose `x` is uint8 (n, height, width, 3), with n from 1 to {MAX_REFERENCES:,}"
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.getinfo("x.npy").file_size > limits.max_member_bytes:
                raise Mistake(f"the references in {path} are longer than limits.max_member_bytes")
            stream = io.BytesIO(archive.read("x.npy"))
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, is_fortran, dtype = read(stream)
    except Mistake:
        raise
    except Exception as error:  # whatever a damaged archive or header makes its reader meet
        raise Mistake(f"{path} holds no references: {error!r}; {expected}") from None
    values = stream.read()
    is_fit = len(shape) == 4 and shape[3] == 3 and 1 <= shape[0] <= MAX_REFERENCES and min(shape[1:3]) >= 1
    if dtype != np.uint8 or not is_fit or len(values) != np.prod(shape, dtype=object):
        raise Mistake(f"{path} holds no references: {dtype} {shape} in {len(values):,} bytes; {expected}")
    return np.frombuffer(values, np.uint8).reshape(shape, order="F" if is_fortran else "C")

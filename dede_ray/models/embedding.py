"""From decoded samples to what detectors see, and the passes that only embed.

`Encoders` turns a chunk into a `Batch`: the victim's embedding, and as far as the run needs them the reference
encoder's and those of the captions. `EmbedWork` writes them as Parquet columns: for the decoder's training, for fitting
detectors, and for scoring again without the images. `fitting_set` draws a keyed sample of shards and embeds it, in a
resumable pass; `in_one_heap` makes of several what detectors are fitted to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional

from dede_ray.data.images import to_unit_range
from dede_ray.data.ledger import KeyedShare, Select, part_path, read_part, read_parts
from dede_ray.data.passes import PassResources, run_pass
from dede_ray.data.sampling import sample_keys
from dede_ray.data.shards import Limits, Shard
from dede_ray.data.workers import Chunk, Laps
from dede_ray.models.victims import ClipVictim, Victim, VictimConfig, best_device, load_victim
from dede_ray.runtime.config import Mistake
from dede_ray.runtime.store import Place

Need = Literal["image", "reference", "caption"]
"""What a detector looks at beside the victim's embedding: the picture, the embedding of an independent encoder that
the user trusts, the victim's embedding of the caption."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples: decoded once, embedded once. The parts that no detector of the run needs are None.

    A fitting set is a batch without pictures. Rows of `caption_BE` and `reference_caption_BR` are NaN where a sample
    has no caption.
    """

    sample_ids: Sequence[str]
    embedding_BE: Tensor
    """float32, as the victim gives it: not of length one."""
    image_BCHW: Tensor | None = None
    """float32 in [0, 1], at the victim's size."""
    reference_BR: Tensor | None = None
    """float32, the reference encoder's embedding of the same pixels."""
    caption_BE: Tensor | None = None
    """float32, the victim's text tower."""
    reference_caption_BR: Tensor | None = None
    """float32, the reference encoder's text tower, where it has one."""

    def __len__(self) -> int:
        return len(self.sample_ids)

    @property
    def device(self) -> torch.device:
        return self.embedding_BE.device

    @property
    def images(self) -> Tensor:
        """The pictures; only for detectors that need `image`."""
        assert self.image_BCHW is not None, "needs image"
        return self.image_BCHW

    @property
    def references(self) -> Tensor:
        """The reference embeddings; only for detectors that need `reference`."""
        assert self.reference_BR is not None, "needs reference"
        return self.reference_BR

    def keys(self, seed: int, *more: int) -> Tensor:
        """One random number per sample, int64 (B,), by its id: `sampling.sample_keys`."""
        return sample_keys(getattr(self.sample_ids, "names", self.sample_ids), seed, *more)

    def part(self, rows: Sequence[int]) -> Batch:
        """Some of the samples, in this order."""
        index = torch.as_tensor(list(rows), dtype=torch.long)
        tensors = {
            field.name: getattr(self, field.name)[index]
            for field in fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        if isinstance(self.sample_ids, Hidden):
            return replace(self, sample_ids=cast(Any, self.sample_ids.part(index.tolist())), **tensors)
        return replace(self, sample_ids=[self.sample_ids[row] for row in index.tolist()], **tensors)


class Hidden:
    """The ids of samples that are to be distinguished and not to be known: good for `Batch.keys` alone."""

    def __init__(self, names: Sequence[str]):
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def part(self, rows: Sequence[int]) -> Hidden:
        return Hidden([self.names[row] for row in rows])


def in_one_heap(*parts: Batch) -> Batch:
    """Corpus and calibration samples as detectors are fitted to them: nothing says which of them are which.

    They are sorted by random keys and have lost their names, so that whatever is learnt from them stays the same where
    a clean corpus sample is exchanged for a calibration sample. That is what p-values of fitted scores rest on.
    """
    names = [name for part in parts for name in part.sample_ids]
    tensors = {}
    for field in fields(Batch):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], Tensor):
            assert all(isinstance(value, Tensor) for value in values), field.name
            tensors[field.name] = torch.cat(values)
    heap = Batch(cast(Any, Hidden(names)), **tensors)
    return heap.part(heap.keys(0).argsort().tolist())


Precision = Literal["float16", "float32"]

EMBEDDINGS = ("embedding", "reference", "caption_embedding", "reference_caption_embedding")
"""Columns of a batch's four tensors."""


@dataclass(frozen=True)
class Encoding:
    """The encoders that embed a sample: the same for a fitting set and for scores."""

    victim: VictimConfig
    reference: VictimConfig | None
    needs: frozenset[Need]
    known: str | None = None
    """Folder of an `EmbedWork` pass of the same victim: what it embedded is read there and not computed again."""

    def check(self, victim: Victim) -> None:
        """Refuse at once what the detectors lack.

        Raises:
            Mistake: they need a reference encoder or captions, and there is none.
        """
        if "reference" in self.needs and self.reference is None:
            raise Mistake(
                "a detector of this run compares the victim with an independent encoder; name one that you trust as "
                "`reference`, such as {kind: open_clip, path: ...}, or leave that detector out"
            )
        if "caption" in self.needs and not isinstance(victim, ClipVictim):
            raise Mistake(
                f"a detector of this run looks at captions, and victim {victim.name} knows no text; leave it out"
            )

    def made_with(self, victim: Victim) -> dict[str, Any]:
        """Everything that the embeddings depend on, as a pass records it."""
        reference = self.reference and load_victim(self.reference).fingerprint
        return {"victim": victim.fingerprint, "reference": reference, "needs": sorted(self.needs - {"image"})}


class Encoders:
    """The victim, and the reference encoder where one is needed, in one actor."""

    def __init__(self, encoding: Encoding):
        self.device = best_device()
        self.needs = encoding.needs
        self.victim = load_victim(encoding.victim).to(self.device)
        self.reference: Victim | None = None
        if "reference" in encoding.needs and encoding.reference is not None:
            self.reference = load_victim(encoding.reference).to(self.device)
        self.image_size = self.victim.image_size
        self.known = encoding.known

    def __call__(self, chunk: Chunk) -> Batch:
        """Embed a chunk."""
        image_BCHW = to_unit_range(_on_device(chunk.image_BHWC, self.device))
        batch = self.embed(chunk.sample_ids, image_BCHW, self._known(chunk))
        if "caption" not in self.needs:
            return batch
        reference = self.reference
        return replace(
            batch,
            caption_BE=_captions(self.victim, chunk.captions),
            reference_caption_BR=_captions(reference, chunk.captions) if isinstance(reference, ClipVictim) else None,
        )

    def _known(self, chunk: Chunk) -> Tensor | None:
        """The chunk's embeddings (B, E) as another pass left them, if that saw these very samples together."""
        if self.known is None or chunk.place is None or not part_path(self.known, *chunk.place).is_file():
            return None
        rows = read_part(self.known, *chunk.place, ["sample_id", "content_hash", "embedding"])
        rows = rows.filter(rows["embedding"].is_valid())
        seen = rows["sample_id"].to_pylist(), rows["content_hash"].to_pylist()
        if seen != (chunk.sample_ids, chunk.content_hashes):
            return None
        return matrix(rows["embedding"]).to(self.device)

    def embed(self, sample_ids: Sequence[str], image_BCHW: Tensor, known_BE: Tensor | None = None) -> Batch:
        """Embed pictures of the victim's size; the reference encoder sees them resized where its own size differs.

        Args:
            known_BE: the victim's embeddings of them, where another pass has them already.
        """
        reference = self.reference
        return Batch(
            sample_ids,
            self.victim(image_BCHW) if known_BE is None else known_BE,
            image_BCHW,
            None if reference is None else reference(_resized(image_BCHW, reference.image_size)),
        )

    def columns(self, precision: Precision) -> dict[str, pa.DataType]:
        """Arrow types of the columns that `stored` gives."""
        kind = pa.float16() if precision == "float16" else pa.float32()
        widths = {"embedding": self.victim.embedding_dim}
        if self.reference is not None:
            widths["reference"] = self.reference.embedding_dim
        if "caption" in self.needs:
            widths["caption_embedding"] = self.victim.embedding_dim
            if isinstance(self.reference, ClipVictim):
                widths["reference_caption_embedding"] = self.reference.embedding_dim
        return {name: pa.list_(kind, width) for name, width in widths.items()}


def _on_device(image_BHWC: np.ndarray, device: torch.device) -> Tensor:
    """Pixels where they are computed with; to a GPU as bytes, from pinned memory, beside what it computes."""
    if device.type == "cpu":
        return torch.tensor(image_BHWC)
    return torch.tensor(image_BHWC, pin_memory=True).to(device, non_blocking=True)


def _resized(image_BCHW: Tensor, size: int) -> Tensor:
    if image_BCHW.shape[-1] == size:
        return image_BCHW
    return functional.interpolate(image_BCHW, (size, size), mode="bilinear", antialias=True, align_corners=False)


def _captions(encoder: Any, captions: list[str | None]) -> Tensor:
    """Embeddings of the captions; rows of NaN where there is none."""
    rows = [row for row, caption in enumerate(captions) if caption is not None]
    caption_BE = torch.full((len(captions), encoder.embedding_dim), torch.nan, device=encoder.device)
    if rows:
        caption_BE[rows] = encoder.encode_text([caption for caption in captions if caption is not None])
    return caption_BE


def stored(batch: Batch, precision: Precision) -> dict[str, list[np.ndarray | None]]:
    """A batch's embeddings as the values of Parquet columns, null where a sample has no caption."""
    tensors = (batch.embedding_BE, batch.reference_BR, batch.caption_BE, batch.reference_caption_BR)
    columns: dict[str, list[np.ndarray | None]] = {}
    for name, tensor in zip(EMBEDDINGS, tensors, strict=True):
        if tensor is not None:
            rows = tensor.cpu().numpy().astype(precision)
            columns[name] = [None if np.isnan(row).all() and "caption" in name else row for row in rows]
    return columns


def restored(table: pa.Table) -> Batch:
    """The batch that `stored` wrote, without its pictures; rows without an embedding are left out."""
    table = with_embeddings(table)
    tensors = [matrix(table[name]) if name in table.column_names else None for name in EMBEDDINGS]
    embedding_BE, *others = tensors
    assert embedding_BE is not None
    return Batch(table["sample_id"].to_pylist(), embedding_BE, None, *others)


def with_embeddings(table: pa.Table) -> pa.Table:
    """The rows of a pass that have embeddings; a row without one takes the same memory."""
    names = [name for name in table.column_names if name == "sample_id" or name in EMBEDDINGS]
    return table.select(names).filter(table["embedding"].is_valid())


def matrix(column: pa.ChunkedArray) -> Tensor:
    """A column of embeddings as float32 rows (N, E), NaN where it is null."""
    width = column.type.list_size
    rows = np.full((len(column), width), np.nan, np.float32)
    is_valid = column.is_valid().to_numpy(zero_copy_only=False)
    values = column.drop_null().combine_chunks()
    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], column.type)
    rows[is_valid] = values.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, width)
    return torch.from_numpy(rows)


class EmbedWork:
    """The pass that only embeds."""

    def __init__(self, encoding: Encoding, precision: Precision = "float32"):
        self.encoders, self.precision = Encoders(encoding), precision
        self.image_size = self.encoders.image_size
        self.columns = self.encoders.columns(precision)
        self.laps = Laps()

    def __call__(self, chunk: Chunk) -> dict[str, Any]:
        batch = self.encoders(chunk)
        columns = stored(batch, self.precision)
        self.laps.mark("encode")
        return columns


# ------------------------------------------------------------------------------------------------ fitting sets


def fitting_set(
    shards: list[Shard],
    folder: Place,
    encoding: Encoding,
    share: float,
    seed: int,
    *,
    chunk_size: int,
    limits: Limits,
    resources: PassResources,
    max_error_fraction: float,
    name: str,
) -> Batch:
    """Draw a share of some samples by their keys and embed them; a rerun does what remains.

    Each sample is drawn by its own id, so that what the workers find adds up in any order, and the same ones are drawn
    however the corpus is cut into chunks.

    Returns:
        Their embeddings, sorted by sample id, without pictures; there may be none.
    """
    victim = load_victim(encoding.victim)
    select: Select | None = KeyedShare(share, seed) if share < 1 else None
    run_pass(
        shards, folder, EmbedWork, {"encoding": encoding}, image_size=victim.image_size,
        made_with={**encoding.made_with(victim), "share": share, "seed": seed}, chunk_size=chunk_size, limits=limits,
        resources=resources, max_error_fraction=max_error_fraction, name=name, select=select,
    )  # fmt: skip
    return gathered(folder, shards)


def gathered(folder: Place, shards: Iterable[Shard], select: Select | None = None) -> Batch:
    """The embeddings of a finished pass, or of those samples that `select` selects, sorted by sample id."""
    tables = []
    for shard in shards:
        table = with_embeddings(read_parts(folder, shard.name))
        if select is not None:
            table = table.filter(pa.array([select(name) for name in table["sample_id"].to_pylist()], pa.bool_()))
        tables.append(table)
    return restored(pa.concat_tables(tables).sort_by("sample_id"))

"""Embeddings: what is stored comes back, and what detectors are fitted on is drawn by the samples' own keys."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from dede_ray.data.ledger import KeyedShare
from dede_ray.data.passes import PassResources
from dede_ray.data.shards import Limits, count_samples, iter_samples, list_shards, open_shard
from dede_ray.data.workers import Chunk
from dede_ray.models.embedding import Batch, Encoders, Encoding, fitting_set, in_one_heap, restored, stored
from dede_ray.models.victims import OpenClipVictim, load_victim
from dede_ray.runtime.config import Mistake

ONE = PassResources(min_actors=1, cpus_per_actor=0.5, decode_cpus=0.5)
CAPTIONS = ["a cat", None, "a dog", "", None]


@pytest.fixture(scope="module")
def configs(victim_folder, reference_folder) -> tuple[OpenClipVictim, OpenClipVictim]:
    return OpenClipVictim(path=str(victim_folder)), OpenClipVictim(path=str(reference_folder))


@pytest.fixture(scope="module")
def encoders(configs) -> Encoders:
    return Encoders(Encoding(*configs, frozenset({"image", "reference", "caption"})))


@pytest.fixture(scope="module")
def batch(encoders, picture) -> Batch:
    return encoders(Chunk([f"a.tar/{i}" for i in range(5)], np.stack([picture(i) for i in range(5)]), CAPTIONS))


def as_table(batch: Batch, encoders: Encoders, precision: str) -> pa.Table:
    columns = stored(batch, precision)
    kinds = encoders.columns(precision)
    assert list(columns) == list(kinds)
    arrays = {name: pa.array(list(values), kinds[name]) for name, values in columns.items()}
    return pa.table({"sample_id": batch.sample_ids, **arrays})


def tensors(batch: Batch) -> list[torch.Tensor]:
    found = [batch.embedding_BE, batch.reference_BR, batch.caption_BE, batch.reference_caption_BR]
    assert all(one is not None for one in found)
    return found


# --- what is stored


@pytest.mark.parametrize(("precision", "rounding"), [("float32", 0), ("float16", 2**-11)])
def test_what_is_stored_comes_back_and_missing_captions_stay_missing(batch, encoders, precision, rounding):
    table = as_table(batch, encoders, precision)
    assert table["caption_embedding"].null_count == table["reference_caption_embedding"].null_count == 2
    found = restored(table)
    assert (found.sample_ids, found.image_BCHW) == (batch.sample_ids, None)
    for there, here in zip(tensors(found), tensors(batch), strict=True):
        assert there.dtype == torch.float32
        torch.testing.assert_close(there, here, rtol=rounding, atol=1e-7 if rounding else 0, equal_nan=True)
    assert found.caption_BE.isnan().all(dim=1).tolist() == [False, True, False, False, True]


def test_samples_without_an_embedding_are_left_out_and_the_others_keep_theirs(batch, encoders):
    table = as_table(batch, encoders, "float32")
    holes = pa.array([None if i in (0, 3) else row for i, row in enumerate(table["embedding"].to_pylist())])
    table = table.set_column(1, "embedding", holes.cast(table.schema.field("embedding").type))
    for some, kept in ((table, [1, 2, 4]), (table.slice(2), [2, 4]), (pa.concat_tables([table, table]), [1, 2, 4] * 2)):
        found, expected = restored(some), batch.part(kept)
        assert found.sample_ids == expected.sample_ids
        for there, here in zip(tensors(found), tensors(expected), strict=True):
            torch.testing.assert_close(there, here, rtol=0, atol=0, equal_nan=True)


def test_only_what_detectors_need_is_embedded(configs, picture):
    chunk = Chunk(["a.tar/0"], picture(0)[None], ["a cat"])
    for needs, kept in ((frozenset({"image"}), 1), (frozenset({"reference"}), 2), (frozenset({"caption"}), 2)):
        encoders = Encoders(Encoding(*configs, needs))
        assert len(stored(encoders(chunk), "float32")) == len(encoders.columns("float32")) == kept


def test_a_reference_encoder_of_another_size_sees_the_same_picture_enlarged(encoders, configs):
    """A picture of one colour is the same at any size."""
    colours = np.array([[255, 0, 0], [10, 200, 90]], np.uint8)
    seen = encoders(Chunk(["a", "b"], np.tile(colours[:, None, None], (1, 32, 32, 1)), [None, None]))
    large_BCHW = torch.from_numpy(colours).float().div(255)[:, :, None, None].expand(2, 3, 64, 64)
    torch.testing.assert_close(seen.references, load_victim(configs[1])(large_BCHW), rtol=1e-4, atol=1e-5)


def test_an_embedding_is_the_same_alone_and_in_company(batch, encoders, picture):
    alone = encoders(Chunk(["a.tar/2"], picture(2)[None], ["a dog"]))
    for one, all_ in zip(tensors(alone), tensors(batch), strict=True):
        torch.testing.assert_close(one[0], all_[2], rtol=1e-4, atol=1e-6)


def test_a_detector_that_compares_needs_a_reference_encoder_and_one_that_reads_a_victim_with_text(configs):
    victim = load_victim(configs[0])
    with pytest.raises(Mistake, match="name one that you trust as `reference`"):
        Encoding(configs[0], None, frozenset({"reference"})).check(victim)
    Encoding(*configs, frozenset({"reference", "caption"})).check(victim)


# --- fitting sets


@pytest.fixture(scope="module")
def corpus(write_pictures, tmp_path_factory) -> Path:
    """Three shards of 40 samples; the last is gzipped."""
    folder = tmp_path_factory.mktemp("corpus") / "shards"
    paths = write_pictures(folder, range(120), per_shard=40)
    paths[-1].with_suffix(".tar.gz").write_bytes(gzip.compress(paths[-1].read_bytes()))
    paths[-1].unlink()
    return folder


def draw(corpus: Path, folder: Path, configs, num_samples: int = 48, **changed) -> Batch:
    settings = {"seed": 0, "chunk_size": 8, "shards": list_shards(str(corpus)), **changed}
    encoding = Encoding(*configs, frozenset({"reference"}))
    return fitting_set(
        settings.pop("shards"), folder, encoding, min(1, num_samples / 120), settings.pop("seed"),
        limits=Limits(), resources=ONE, max_error_fraction=0, name="test", **settings,
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("parts/*/[!.]*"))}


@pytest.fixture(scope="module")
def drawn(local_ray, corpus, configs) -> Batch:
    return draw(corpus, corpus.parent / "fitting", configs)


def test_a_share_of_the_corpus_is_drawn_sorted_by_id_and_embedded(drawn, configs, picture):
    assert 30 <= len(drawn) <= 66  # 48 of 120, give or take three standard deviations
    assert drawn.sample_ids == sorted(set(drawn.sample_ids))
    assert {name.partition("/")[0] for name in drawn.sample_ids} == {
        "train-00000.tar", "train-00001.tar", "train-00002.tar.gz"
    }  # fmt: skip
    encoders = Encoders(Encoding(*configs, frozenset({"reference"})))
    numbers = [int(name.rpartition("/")[2]) for name in drawn.sample_ids]
    by_hand = encoders(Chunk(drawn.sample_ids, np.stack([picture(n) for n in numbers]), [None] * len(numbers)))
    torch.testing.assert_close(drawn.embedding_BE, by_hand.embedding_BE, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(drawn.references, by_hand.references, rtol=1e-4, atol=1e-6)


def test_the_same_samples_are_drawn_in_whatever_order_and_chunks_they_come(drawn, corpus, configs, tmp_path):
    other = draw(corpus, tmp_path / "f", configs, shards=list_shards(str(corpus))[::-1], chunk_size=5)
    assert other.sample_ids == drawn.sample_ids
    torch.testing.assert_close(other.embedding_BE, drawn.embedding_BE, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_what_a_kill_has_left_is_completed_to_the_same_bytes(drawn, corpus, configs, tmp_path):
    shutil.copytree(corpus.parent / "fitting", tmp_path / "f")
    whole = contents(tmp_path / "f")
    shutil.rmtree(tmp_path / "f" / "parts" / "train-00001.tar")
    (tmp_path / "f" / "parts" / "train-00000.tar" / "000000.parquet").unlink()
    (tmp_path / "f" / "parts" / "train-00002.tar.gz" / "end.json").unlink()
    assert contents(tmp_path / "f") != whole
    again = draw(corpus, tmp_path / "f", configs)
    assert contents(tmp_path / "f") == whole
    assert torch.equal(again.embedding_BE, drawn.embedding_BE)


def test_a_fitting_set_of_another_size_is_not_mixed_with_this_one(drawn, corpus, configs):
    with pytest.raises(Mistake, match=r"share: 0\.4 there, 0\.5 now"):
        draw(corpus, corpus.parent / "fitting", configs, num_samples=60)


def test_a_share_is_what_was_asked_for_and_another_seed_draws_others():
    ids = [f"train-{i // 500:05d}.tar/{i}" for i in range(4000)]
    small, large, other = (
        {name for name in ids if KeyedShare(share, seed)(name)} for share, seed in ((0.1, 0), (0.3, 0), (0.3, 1))
    )
    assert abs(len(small) - 400) < 4 * np.sqrt(4000 * 0.1 * 0.9)
    assert abs(len(large) - 1200) < 4 * np.sqrt(4000 * 0.3 * 0.7)
    assert small < large  # who wants more keeps what there was
    assert abs(len(large & other) - 360) < 4 * np.sqrt(4000 * 0.09 * 0.91)
    assert all(KeyedShare(1, 0)(name) for name in ids)


def test_samples_are_counted_as_they_will_be_read(local_ray, write_tar, png, tmp_path):
    members = [
        (f"{i:02d}.{suffix}", png(i) if suffix == "png" else b"7") for i in range(9) for suffix in ("cls", "png")
    ]
    whole = write_tar("plain.tar", members).read_bytes()
    write_tar("rubbish.tar", [("a.png", b"rubbish"), ("b.txt", b"words"), ("c.png", png(1))])
    (tmp_path / "packed.tar.gz").write_bytes(gzip.compress(whole))
    (tmp_path / "misnamed.tar").write_bytes(gzip.compress(whole))  # gzipped, whatever its name says
    (tmp_path / "cut.tar").write_bytes(whole[: whole.index(b"04.png") + 700])
    (tmp_path / "cut.tar.gz").write_bytes(gzip.compress(whole)[:3000])
    for shard in list_shards(str(tmp_path)):
        with open_shard(shard) as stream:
            num_read = sum(1 for _ in iter_samples(stream, Limits()))
        assert num_read > 0
        assert count_samples([shard]) == num_read, shard.name
    assert count_samples(list_shards([str(tmp_path / "plain.tar"), str(tmp_path / "misnamed.tar")])) == 18


def test_a_corpus_of_which_nothing_can_be_embedded_is_a_mistake(local_ray, write_tar, configs, tmp_path):
    write_tar("shards/a.tar", [(f"{i}.png", b"rubbish") for i in range(9)])
    with pytest.raises(Mistake, match=r"9 of 9 samples cannot be used \(image_unreadable 9\)"):
        draw(tmp_path / "shards", tmp_path / "f", configs, num_samples=120)


def test_what_is_fitted_on_is_one_heap_without_names():
    draw = torch.Generator().manual_seed(0)
    corpus, calibration = (
        Batch(
            [f"{name}.tar/{i}" for i in range(num)], torch.rand(num, 3, generator=draw), reference_BR=torch.rand(num, 2)
        )
        for name, num in (("corpus", 30), ("calibration", 20))
    )
    heap, other = in_one_heap(corpus, calibration), in_one_heap(calibration, corpus)
    torch.testing.assert_close(heap.embedding_BE, other.embedding_BE)  # nothing says who came first
    torch.testing.assert_close(heap.references, other.references)
    assert sorted(heap.keys(3).tolist()) == sorted([*corpus.keys(3).tolist(), *calibration.keys(3).tolist()])
    some = heap.part([4, 2])
    assert some.keys(0).tolist() == heap.keys(0)[[4, 2]].tolist()
    for look in (lambda: heap.sample_ids[0], lambda: list(heap.sample_ids)):
        with pytest.raises(TypeError):
            look()

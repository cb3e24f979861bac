"""The order of training: batches follow from settings and step alone, and an epoch sees every sample once."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections import Counter

import numpy as np
import pytest

from dede_ray.data.images import decode_image
from dede_ray.data.shards import BadSample, Limits, Sample, Shard, iter_chunks, list_shards
from dede_ray.runtime.config import Mistake
from dede_ray.training.dataloader import (
    ChunkRef,
    Plan,
    Seen,
    batches,
    decode_samples,
    index_shards,
    read_samples,
    read_window,
)

LIMITS = Limits()


def made_up(sizes: list[int]) -> list[ChunkRef]:
    """Chunks of these sizes, for questions that need no files."""
    return [ChunkRef(Shard(f"s{i}.tar", "", 0), 0, 0, size) for i, size in enumerate(sizes)]


def plan_of(index, batch_size, lanes, seed=0, shuffle=True, steps_per_window=4, epochs=10.0, weights=None) -> Plan:
    return Plan(index, batch_size, lanes, seed, shuffle, steps_per_window, epochs, weights)


def lane_samples(plan: Plan, lane: int, first: int, count: int) -> list[tuple[int, str, int]]:
    """The samples of a stretch of a lane as (epoch, shard, place)."""
    pieces = plan.pieces(lane, first, count)
    return [(epoch, ref.shard.name, i) for epoch, ref, start, stop in pieces for i in range(start, stop)]


def ids(ref, epoch, start, samples):
    """A decode that keeps names only, and leaves out what cannot be read."""
    names, errors = [], []
    for sample in samples:
        try:
            decode_image(sample.image or b"", LIMITS)
        except BadSample as bad:
            errors.append(bad.reason)
            continue
        names.append(f"{ref.shard.name}/{sample.key}".encode())
        errors.append(None)
    return {"sample_id": np.array(names, "S20")}, errors


def names_of(columns) -> list[str]:
    return sorted(name.decode() for name in columns["sample_id"])


# --- samples to columns


def test_what_cannot_be_used_has_its_reason_and_leaves_no_value_behind():
    samples = [
        Sample("a", 0, b"1"),
        Sample("b", 1),
        Sample("c", 2, b"3", error="image_unreadable"),
        Sample("d", 3, b"4"),
    ]

    def read_one(sample: Sample, content: bytes, name: str) -> dict:
        if sample.key == "d":
            raise BadSample("caption_missing")
        return {"image": content}

    kept, errors = decode_samples(made_up([4])[0], samples, read_one)
    assert kept == {"image": [b"1"], "name": ["s0.tar/a"]}
    assert errors == [None, "no_image", "image_unreadable", "caption_missing"]
    assert kept["what no sample has"] == []


# --- the plan


PLANS = [
    (sizes, lanes, shuffle)
    for sizes in ([7], [1] * 9, [5, 5, 5, 2], [3, 1, 8, 4, 1, 1, 6], [64, 64, 37])
    for lanes in (1, 2, 4)
    for shuffle in (True, False)
]


@pytest.mark.parametrize(("sizes", "lanes", "shuffle"), PLANS)
def test_every_epoch_holds_every_sample_exactly_once(sizes, lanes, shuffle):
    plan = plan_of(made_up(sizes), lanes, lanes, shuffle=shuffle, epochs=5)
    seen = [sample for lane in range(lanes) for sample in lane_samples(plan, lane, 0, plan.num_steps)]
    for epoch in range(5):
        places = Counter((shard, place) for e, shard, place in seen if e == epoch)
        assert places == {(f"s{i}.tar", place): 1 for i, size in enumerate(sizes) for place in range(size)}
    assert 0 <= len(seen) - 5 * sum(sizes) < lanes  # what fills up the last batch
    assert {epoch for epoch, _, _ in seen} <= set(range(6))


def test_weights_say_how_often_an_epoch_holds_a_sample():
    index, weights = made_up([1] * 20), [2.0] * 5 + [0.5] * 10 + [1.5] * 5
    plan = plan_of(index, 4, 2, epochs=8, weights=weights)
    seen = Counter(
        (epoch, shard) for lane in range(2) for epoch, shard, _ in lane_samples(plan, lane, 0, 2 * plan.num_steps)
    )
    times = np.array([[seen[epoch, f"s{i}.tar"] for i in range(20)] for epoch in range(8)])
    assert (times[:, :5] == 2).all()
    assert (times[:, 5:15].sum(axis=1) == 5).all()  # half of the source each epoch ...
    assert (times[0::2, 5:15] + times[1::2, 5:15] == 1).all()  # ... and the other half in the next
    assert set(times[:, 15:].ravel()) == {1, 2}
    assert (times[:, 15:].sum(axis=0) == 12).all()


@pytest.mark.parametrize(("sizes", "lanes", "shuffle"), PLANS)
def test_a_lane_is_the_same_however_it_is_cut(sizes, lanes, shuffle):
    plan = plan_of(made_up(sizes), batch_size=lanes, lanes=lanes, seed=5, shuffle=shuffle, steps_per_window=4)
    count = 3 * sum(sizes) // lanes + 1  # over several ends of epochs
    for lane in range(lanes):
        whole = lane_samples(plan, lane, 0, count)
        assert len(whole) == count
        for step in (1, 2, 5, 11):
            cuts = [lane_samples(plan, lane, first, min(step, count - first)) for first in range(0, count, step)]
            assert list(itertools.chain(*cuts)) == whole


def test_chunks_come_in_another_order_in_each_epoch_and_for_each_seed():
    orders = set()
    for seed, epoch in itertools.product(range(3), range(3)):
        plan = plan_of(made_up([2] * 20), batch_size=1, lanes=1, seed=seed, shuffle=True, steps_per_window=4)
        orders.add(tuple(shard for _, shard, _ in lane_samples(plan, 0, 40 * epoch, 40)))
    assert len(orders) == 9


def test_without_shuffling_a_single_lane_follows_the_shards():
    plan = plan_of(made_up([3, 2]), batch_size=1, lanes=1, seed=0, shuffle=False, steps_per_window=4)
    in_order = [("s0.tar", 0), ("s0.tar", 1), ("s0.tar", 2), ("s1.tar", 0), ("s1.tar", 1)]
    assert lane_samples(plan, 0, 0, 10) == [(epoch, *place) for epoch in (0, 1) for place in in_order]


def test_settings_that_do_not_divide_are_mistakes():
    with pytest.raises(Mistake, match="batch_size 10 must be a multiple of lanes 4"):
        plan_of(made_up([100]), batch_size=10, lanes=4, seed=0, shuffle=True, steps_per_window=4)
    with pytest.raises(Mistake, match="3 training samples are fewer than the 4 lanes"):
        plan_of(made_up([3]), batch_size=8, lanes=4, seed=0, shuffle=True, steps_per_window=4)
    plan = plan_of(made_up([100]), batch_size=8, lanes=4, seed=0, shuffle=True, steps_per_window=4)
    with pytest.raises(Mistake, match="lanes 4 must be a multiple of the 3 training workers"):
        next(batches(plan, 0, rank=0, world=3, limits=LIMITS, decode=ids))


# --- finding chunks


def tar_of(path, members) -> None:
    """Write (name, content, kind) members; `kind` is a tarfile type."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content, kind in members:
            header = tarfile.TarInfo(name)
            header.type, header.size = kind, len(content) if kind == tarfile.REGTYPE else 0
            header.linkname = "elsewhere" if kind == tarfile.SYMTYPE else ""
            tar.addfile(header, io.BytesIO(content))


def test_chunks_found_by_headers_are_those_that_reading_gives(local_ray, png, tmp_path):
    file, folder, link = tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE
    plain = [(f"k{i}.{suffix}", png(i), file) for i in range(8) for suffix in ("png", "txt")]
    odd = [
        ("folder", b"", folder),
        ("folder/a.png", png(1), file),
        ("a.link.png", b"", link),
        ("folder/a.txt", b"still a", file),  # the link between does not end the sample
        ("b", b"no suffix", file),
        ("猫" * 60 + ".png", png(2), file),  # needs a header of its own before the header
        ("caf\udce9.png", png(3), file),
        ("only.json", b"{}", file),
        ("z.txt", b"", file),
        ("v1.2/z.png", png(4), file),
        ("tail", b"", folder),
    ]
    doubled = [*plain[:6], *plain[:6], *plain[2:4]]
    for name, members in (("plain", plain), ("odd", odd), ("doubled", doubled)):
        tar_of(tmp_path / f"{name}.tar", members)
    content = (tmp_path / "plain.tar").read_bytes()
    for size in (600, 1024, 1536, 5000, 9 * 1024 + 300, len(content) - 11_000, len(content) - 600):
        (tmp_path / f"cut{size:06d}.tar").write_bytes(content[:size])
    place = content.index(b"k5.png")
    (tmp_path / "rubbish.tar").write_bytes(content[:place] + b"\x07" * 512 + content[place + 512 :])

    shards = list_shards(str(tmp_path))
    for chunk_size in (1, 3, 100):
        index = index_shards(shards, chunk_size)
        for shard in shards:
            refs = [ref for ref in index if ref.shard == shard]
            chunks = list(iter_chunks(shard, chunk_size, LIMITS))
            assert [(ref.number, ref.num_samples) for ref in refs] == [(i, len(c)) for i, c in enumerate(chunks)], shard
            for ref, chunk in zip(refs, chunks, strict=True):
                read = read_samples(ref, 0, ref.num_samples, LIMITS)
                # Read from the middle, a key that came back is not known to have; its bytes are the same.
                one, other = ([(s.key.split("#")[0], s.image, s.caption) for s in each] for each in (read, chunk))
                assert one == other
                assert read_samples(ref, ref.num_samples - 1, ref.num_samples, LIMITS) == read[-1:]


def test_compressed_shards_are_refused_whatever_their_name(local_ray, write_tar, png, tmp_path):
    write_tar("s.tar.gz", [("a.png", png())])
    with pytest.raises(Mistake, match="is compressed"):
        index_shards(list_shards(str(tmp_path)), 4)
    (tmp_path / "s.tar.gz").rename(tmp_path / "s.tar")
    with pytest.raises(Mistake, match="is compressed"):
        index_shards(list_shards(str(tmp_path)), 4)


# --- batches


@pytest.fixture(scope="module")
def index(local_ray, write_pictures, tmp_path_factory) -> list[ChunkRef]:
    """50 samples in three shards, in chunks of up to 8."""
    folder = tmp_path_factory.mktemp("feed")
    write_pictures(folder, range(50), per_shard=20)
    return index_shards(list_shards(str(folder)), 8)


def test_which_samples_make_up_a_batch_does_not_depend_on_the_world(index):
    plan = plan_of(index, batch_size=8, lanes=4, seed=0, shuffle=True, steps_per_window=5)
    for window in range(3):
        by_world = []
        for world in (1, 2, 4):
            ranks = [list(read_window(plan, list(range(r, 4, world)), window, LIMITS, ids)) for r in range(world)]
            steps = zip(*ranks, strict=True)
            by_world.append([sorted(name for columns in step for name in names_of(columns)) for step in steps])
            assert {len(columns["sample_id"]) for rank in ranks for columns in rank} == {8 // world}
        assert by_world[0] == by_world[1] == by_world[2]
        assert len(by_world[0]) == 5


def test_batches_hold_every_sample_once_per_epoch_and_epochs_follow_each_other(index):
    plan = plan_of(index, batch_size=8, lanes=4, steps_per_window=5, epochs=3)
    steps = [c for window in range(4) for c in read_window(plan, [0, 1, 2, 3], window, LIMITS, ids)]
    assert len(steps) == plan.num_steps == 19  # 150 samples, 8 at a time
    seen = Counter((int(e), n) for c in steps for e, n in zip(c["epoch"], c["sample_id"], strict=True))
    assert set(seen.values()) == {1}
    assert Counter(epoch for epoch, _ in seen) == {0: 50, 1: 50, 2: 50, 3: 2}
    at = [np.concatenate([np.full(8, i) for i, c in enumerate(steps)])[
        np.concatenate([c["epoch"] for c in steps]) == e] for e in range(3)]  # fmt: skip
    assert at[0].max() <= at[1].min() + 1  # but for the batch or two in which one ends and the next begins
    assert at[1].max() <= at[2].min() + 1
    orders = [[n for c in steps for e, n in zip(c["epoch"], c["sample_id"], strict=True) if e == i] for i in (0, 1)]
    assert orders[0] != orders[1]


def test_a_samples_place_is_its_number_over_all_chunks(index):
    plan = plan_of(index, batch_size=10, lanes=2, epochs=1)
    batches = [columns for window in range(2) for columns in read_window(plan, [0, 1], window, LIMITS, ids)]
    names = dict(zip(*(np.concatenate([c[k] for c in batches]).tolist() for k in ("place", "sample_id")), strict=True))
    assert [names[place] for place in range(50)] == [
        f"train-{i // 20:05d}.tar/{i:04d}".encode() for i in range(50)
    ]  # fmt: skip


@pytest.mark.parametrize(("rank", "world", "first_step"), [(0, 1, 0), (1, 2, 7)])
def test_batches_through_ray_are_the_windows_and_resume_in_the_middle_of_one(
    index, rank, world, first_step, monkeypatch
):
    monkeypatch.setattr("dede_ray.training.dataloader.BYTES_PER_DATASET", 1)
    plan = plan_of(index, batch_size=8, lanes=4, steps_per_window=5, epochs=2)
    assert plan.num_steps == 13
    lanes = list(range(rank, 4, world))
    expected = [columns for window in range(3) for columns in read_window(plan, lanes, window, LIMITS, ids)]
    got = list(batches(plan, first_step, rank, world, LIMITS, ids, read_cpus=0.5))
    assert [step for step, _ in got] == list(range(first_step, 13))
    for step, columns in got:
        assert columns.keys() == expected[step].keys()
        for name, column in columns.items():
            np.testing.assert_array_equal(column, expected[step][name])


def test_a_decode_that_carries_much_is_read_with_all_the_same(index):
    luggage = np.zeros(2**21, np.uint8)

    def decode(*arguments):
        assert luggage.nbytes == 2**21
        return ids(*arguments)

    plan = plan_of(index, batch_size=10, lanes=2, epochs=1)
    assert [step for step, _ in batches(plan, 0, 0, 1, LIMITS, decode, read_cpus=0.5)] == [0, 1, 2, 3, 4]


def test_unreadable_samples_are_replaced_by_others_of_their_window_and_counted(local_ray, write_tar, png, tmp_path):
    write_tar("s.tar", [(f"{i:02d}.png", b"rubbish" if i % 4 == 0 else png(i)) for i in range(16)])
    index = index_shards(list_shards(str(tmp_path)), 4)
    plan = plan_of(index, batch_size=8, lanes=2, steps_per_window=2, epochs=1)
    steps = list(read_window(plan, [0, 1], 0, LIMITS, ids))
    seen = Counter(name for columns in steps for name in names_of(columns))
    assert [len(columns["sample_id"]) for columns in steps] == [8, 8]
    assert set(seen) == {f"s.tar/{i:02d}" for i in range(16) if i % 4}
    assert sorted(seen.values()) == [1] * 8 + [2] * 4
    assert [json.loads(columns["unusable"].tobytes()) for columns in steps] == [[[0, "image_unreadable", 4]], []]
    account = Seen(plan.num_samples)
    for columns in steps:
        account.add(columns)
    told = {"epochs": [0, 0], "seen": 12, "repeated": 4, "unseen": 0, "unusable": {"image_unreadable": 4}}
    assert account.report() == {"samples": 16, "by_epoch": [told]}


def test_a_window_without_a_usable_sample_is_a_mistake(local_ray, write_tar, tmp_path):
    write_tar("s.tar", [(f"{i:02d}.png", b"rubbish") for i in range(16)])
    plan = plan_of(index_shards(list_shards(str(tmp_path)), 4), 8, lanes=2, steps_per_window=2)
    with pytest.raises(Mistake, match=r"none of 8 training samples in a row can be used \(image_unreadable: 8\)"):
        list(read_window(plan, [0, 1], 0, LIMITS, ids))


# --- accounting


def marks(epoch: int, places: list[int]) -> dict[str, np.ndarray]:
    return {"epoch": np.full(len(places), epoch), "place": np.array(places), "unusable": np.frombuffer(b"[]", np.uint8)}


def test_the_account_contradicts_a_feed_that_loses_or_repeats():
    account = Seen(20)
    account.add(marks(0, [*range(18), 3]))
    account.add(marks(0, [3, 17]))
    account.add(marks(1, [0]))
    first, second = account.report()["by_epoch"]
    assert (first["seen"], first["repeated"], first["unseen"]) == (18, 3, 2)
    assert (second["seen"], second["unseen"]) == (1, 19)


def test_the_account_survives_being_saved_and_the_closing_of_epochs(tmp_path):
    account, whole = Seen(20), Seen(20)
    for part in (marks(0, list(range(20))), marks(1, [1, 2, 2])):
        account.add(part)
        whole.add(part)
    account.fold(0, 1, open_epoch=1)
    account.save(tmp_path / "seen.npz")
    resumed = Seen(20)
    resumed.load(tmp_path / "seen.npz")
    assert list(resumed.bits) == [1]
    for one in (resumed, whole):
        one.add(marks(1, [2, 5]))
    assert resumed.report() == whole.report()

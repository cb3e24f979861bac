"""What looks like an image or a caption and is read as neither: counted, and said."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from passes import run
from tars import read, triple

from dede_ray.data.shards import CaptionFrom, Limits, list_shards
from dede_ray.data.unread import hint, why_no_image
from dede_ray.runtime.config import Mistake
from dede_ray.training.dataloader import ChunkRef
from dede_ray.training.sections import refuse_unfit


@pytest.fixture
def shard(write_tar):
    return lambda members: list_shards(str(write_tar("s.tar", members)))[0]


def in_json(num: int, png, **about) -> list[tuple[str, bytes]]:
    content = json.dumps({"url": "http://x/", "width": 3, **about}).encode()
    return [member for i in range(num) for member in ((f"{i}.png", png(i)), (f"{i}.json", content))]


def test_members_of_compound_names_are_told_of(shard, png):
    there = shard([m for i in range(3) for m in ((f"{i}.input.png", png(i)), (f"{i}.output.txt", b"a thing"))])
    assert hint(there, Limits(), "image") == (
        "; s.tar has 3 members .input.png, such as 0.input.png: a key ends at the first dot of a name, so these are "
        "read as no image; rename them"
    )
    assert "set limits.caption.member to output.txt" in hint(there, Limits(), "caption")


def test_where_there_is_an_image_and_a_caption_nothing_is_told(shard, png):
    there = shard([*triple("k", png()), ("k.seg.png", png()), ("k.json", b'{"caption": "a photo"}')])
    assert hint(there, Limits(), "image", "caption") == ""
    assert hint(shard([("k.png", png()), ("k.json", b"[" * 9999), ("m.json", b"[3]")]), Limits(), "caption") == ""


@pytest.mark.parametrize(
    ("about", "field"),
    [
        ({"caption": "a photo"}, "caption"),
        ({"TEXT": "a photo"}, "TEXT"),
        ({"captions": ["one", "two"], "text_url": "x"}, "captions"),
        ({"alt_text": "a photo", "title": "photo"}, "title"),
        ({"meta": {"caption": "a photo"}, "score": float("nan")}, "meta.caption"),
        ({"caption": 3, "text": ""}, None),
    ],
)
def test_captions_in_json_are_told_of(shard, png, about, field):
    said = hint(shard(in_json(4, png, **about)), Limits(), "caption")
    assert said == (
        f"; s.tar has 4 members .json with a field `{field}`: set limits.caption.field to {field}" if field else ""
    )


def test_training_says_where_the_text_is(shard, png):
    there = shard(in_json(4, png, caption="a photo"))
    with pytest.raises(Mistake, match=r"\(caption_missing: 4\); .* set limits.caption.field to caption"):
        refuse_unfit([ChunkRef(there, 0, 0, 4)], Limits(), with_captions=True)
    refuse_unfit([ChunkRef(there, 0, 0, 4)], Limits(caption=CaptionFrom(field="caption")), with_captions=True)


@pytest.mark.parametrize(
    ("source", "content", "caption", "notes"),
    [
        (CaptionFrom(field="caption"), b'{"caption": "a photo"}', "a photo", []),
        (CaptionFrom(field="a.b"), b'{"a": {"b": "a photo"}}', "a photo", []),
        (CaptionFrom(field="caption"), b'{"caption": ["", "a photo", "b"]}', "a photo", []),
        (CaptionFrom(field="caption"), b'{"caption": null}', None, []),
        (CaptionFrom(field="caption"), b'{"text": "a photo"}', None, []),
        (CaptionFrom(field="caption"), b'{"caption": 3}', None, ["caption_unreadable"]),
        (CaptionFrom(field="caption"), b'["a photo"]', None, ["caption_unreadable"]),
        (CaptionFrom(field="caption"), b'{"caption": "a photo", "score": NaN}', "a photo", []),
        (CaptionFrom(field="caption"), b"rubbish", None, ["caption_unreadable"]),
        (CaptionFrom(field="caption"), b'{"caption": "\\ud800"}', None, ["caption_unreadable"]),
        (CaptionFrom(field="caption"), b'{"caption": "%s"}' % (b"a" * 30), "a" * 20, ["caption_too_long"]),
        (CaptionFrom(member=".JSON"), b"a photo", "a photo", []),
    ],
)
def test_captions_are_read_where_settings_say_that_they_are(write_tar, png, source, content, caption, notes):
    path = write_tar("s.tar", [("k.png", png()), ("k.json", content), ("k.txt", b"not this")])
    [sample] = read(path, Limits(caption=source, max_caption_chars=20))
    assert (sample.error, sample.caption, sample.notes) == (None, caption, notes)


def test_a_tar_sorted_by_type_is_told_how_to_be_sorted():
    assert "sort the tar by name" in why_no_image([], Limits(), Counter(duplicate_key=12))


def test_a_suffix_of_images_or_labels_holds_no_captions():
    with pytest.raises(ValueError, match="are read as images or labels"):
        CaptionFrom(member="cls")


def test_a_pass_without_images_says_why(local_ray, write_tar, png, tmp_path):
    write_tar("shards/a.tar", [m for i in range(12) for m in ((f"{i}.input.png", png(i)), (f"{i}.txt", b"a thing"))])
    with pytest.raises(Mistake, match=r"no_image 12\).*12 members .input.png, such as 0.input.png: a key ends"):
        run(tmp_path / "shards", tmp_path / "pass")


def test_a_pass_scores_what_is_beside_unusable_captions_and_labels(local_ray, write_tar, png, tmp_path):
    members = [
        m for i in range(8) for m in ((f"{i}.png", png(i)), (f"{i}.cls", b"dog"), (f"{i}.txt", b"\xff" * (i % 2)))
    ]
    write_tar("shards/a.tar", members)
    summary = run(tmp_path / "shards", tmp_path / "pass", max_error_fraction=0)
    assert (summary.num_samples, summary.errors) == (8, {})
    assert summary.notes == {"caption_unreadable": 4, "label_unreadable": 8}

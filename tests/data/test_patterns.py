"""What a string of the settings stands for: names, folders, patterns, ranges, lists; and what is not read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dede_ray.data.patterns import expand
from dede_ray.data.shards import list_shards
from dede_ray.runtime.config import Config, Mistake
from dede_ray.runtime.store import ObjectPath, StoreError, filesystem_of


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Make files of these names below the working folder."""

    def make(*names: str) -> Path:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"x")
        return tmp_path

    monkeypatch.chdir(tmp_path)
    return make


def found(pattern: str) -> list[str]:
    return sorted(os.path.relpath(file.url) for file in expand(pattern))


FILES = ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar", "b/c/0.tar"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a", ["a/0.tar", "a/1.tar"]),
        ("a/0.tar", ["a/0.tar"]),
        ("a/*.tar", ["a/0.tar", "a/1.tar"]),
        ("*/0.tar", ["a/0.tar", "b/0.tar"]),
        ("a/{0..1}.tar", ["a/0.tar", "a/1.tar"]),
        ("{a,b}/0.tar", ["a/0.tar", "b/0.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("{a/0,b/c/0}.tar", ["a/0.tar", "b/c/0.tar"]),
        ("{a,b{,/c}}/0.tar", ["a/0.tar", "b/0.tar", "b/c/0.tar"]),
        ("{a,b/c}", ["a/0.tar", "a/1.tar", "b/c/0.tar"]),
        ("{a,b}/[0].tar", ["a/0.tar", "b/0.tar"]),
        ("a/0.tar::b/1.tar", ["a/0.tar", "b/1.tar"]),
        ("a/{0..1}.tar::b/c", ["a/0.tar", "a/1.tar", "b/c/0.tar"]),
        ("nothing/*.tar", []),
        ("a/{8..9}.tar", []),
        ("a/{0.tar", []),
    ],
)
def test_a_pattern_finds_its_files(tree, pattern, expected):
    tree(*FILES)
    assert found(pattern) == expected
    assert found(f"file://{Path.cwd()}/a/0.tar") == ["a/0.tar"]


@pytest.mark.parametrize(
    "folder", ["[v2]", "what?", "run#1", "{x}", "{a,b}", "a::b", "100%", "a+b", "st*r", "a b", "[v2]/{0..1}", "~"]
)
def test_a_folder_that_exists_is_taken_as_it_is(tree, folder):
    tree(f"{folder}/00000.tar", f"{folder}/00001.tar", "v/00000.tar", "a/00000.tar")
    both = [f"{folder}/00000.tar", f"{folder}/00001.tar"]
    start = "./" if folder == "~" else ""
    assert found(start + folder) == both
    assert found(f"{start}{folder}/00000.tar") == both[:1]
    assert found(f"{start}{folder}/*.tar") == both
    assert found(f"{start}{folder}/{{00000..00001}}.tar") == both
    assert found(f"{start}{folder}/00000.tar::a/00000.tar") == sorted([both[0], "a/00000.tar"])


def test_missing_numbers_of_a_range_are_named(tree):
    tree("a/0.tar", "a/3.tar", "b/1.tar")
    with pytest.raises(Mistake, match=r"4 of the 6 names that a/\{0..5\}.tar .*: a/1.tar, .*; name those") as said:
        expand("a/{0..5}.tar")
    assert "a/5.tar" in str(said.value)
    with pytest.raises(Mistake, match=r"1 of the 2 names .* not exist: c/\*\.tar"):
        expand("{a,c}/*.tar")
    with pytest.raises(Mistake, match="stands for more than 1,000,000 names"):
        expand("a/{0..99999999999}.tar")
    with pytest.raises(Mistake, match="stands for more than 1,000,000 names"):
        expand("a/{0..9999}{0..9999}.tar")


def test_a_text_file_lists_shards(tree):
    tree(*FILES)
    Path("list.txt").write_text("\ufeffa/0.tar\r\n\n b/{0..1}.tar\n")
    assert found("list.txt") == ["a/0.tar", "b/0.tar", "b/1.tar"]
    Path("list.txt").write_text("a/0.tar\nc/0.tar\nb/7.tar\n")
    with pytest.raises(Mistake, match=r"2 of the 3 shards that list.txt lists .*: c/0.tar \(line 2\), b/7.tar"):
        expand("list.txt")
    Path("list.txt").write_text("list.txt\n")
    with pytest.raises(Mistake, match=r"names another list, list.txt, in line 1"):
        expand("list.txt")
    Path("list.txt").write_bytes(b"\xff\xfe\0")
    with pytest.raises(Mistake, match=r"list.txt should list shards, one a line"):
        expand("list.txt")


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("pipe:aws s3 cp s3://bucket/{00000..00002}.tar -", "no command is run .*; name s3://bucket/.* itself"),
        ("pipe:curl -s https://example.com/0.tar", "no command is run .*; name the files themselves"),
        ("https://example.com/{0..9}.tar", "not from web servers; download them first"),
        ("a::http://example.com/0.tar", "not from web servers"),
    ],
)
def test_what_is_not_read_is_refused_in_a_sentence(tree, pattern, said):
    tree(*FILES)
    with pytest.raises(Mistake, match=said):
        list_shards(pattern)


def test_home_is_expanded_in_every_setting(tree, monkeypatch):
    class Inner(Config):
        path: str

    class Outer(Config):
        shards: str | list[str]
        inner: Inner | None = None
        named: dict[str, str] = {}  # noqa: RUF012

    home = tree(*FILES)
    monkeypatch.setenv("HOME", str(home))
    assert Outer(shards="~/a").shards == f"{home}/a"
    config = Outer.model_validate(
        {"shards": ["~/a", "b~"], "inner": {"path": "~/x"}, "named": {"train": "~/b", "~": "~user-of-nowhere/a"}}
    )
    assert (config.shards, config.inner, config.named) == (
        [f"{home}/a", "b~"], Inner(path=f"{home}/x"), {"train": f"{home}/b", "~": "~user-of-nowhere/a"}
    )  # fmt: skip
    assert found("~/a/0.tar::~/b/0.tar") == ["a/0.tar", "b/0.tar"]


def test_a_key_of_a_store_may_hold_hashes_and_question_marks(monkeypatch):
    monkeypatch.setenv("AWS_REGION", "nowhere")
    for key in ("run#1/00000.tar", "what?/00000.tar", "100%/a b.tar"):
        there = ObjectPath(f"s3://bucket/{key}?scheme=http")
        assert (there.name, there.query) == (key.rpartition("/")[2], "scheme=http")
        assert filesystem_of(there)[1] == f"bucket/{key}"


def test_a_store_of_another_maker_that_fails_is_a_store_error(monkeypatch):
    class ConnectError(Exception):
        """As httpx has one, which is no OSError."""

    def refuse(*_):
        raise ConnectError("no network")

    monkeypatch.setattr("dede_ray.runtime.store._filesystem", refuse)
    with pytest.raises(StoreError, match=r"hf://datasets/org/name/0.tar: no network"):
        list_shards("hf://datasets/org/name/0.tar")

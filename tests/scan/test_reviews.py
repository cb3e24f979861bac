"""Reviews: what people said, read back line by line; nothing is lost silently."""

from __future__ import annotations

import gzip
import itertools
import json

import pytest

from dede_ray.runtime.config import Mistake
from dede_ray.scan.reviews import EXAMPLE, Look, Reviews, count_looks, read_reviews


def line(name="a.tar/1", verdict="poisoned", who="ada", when="2026-03-01T10:00:00Z", **more) -> str:
    return json.dumps({"sample_id": name, "verdict": verdict, "who": who, "when": when, **more}) + "\n"


@pytest.fixture
def reviews(tmp_path):
    def read(*contents: str | bytes) -> Reviews:
        paths = [tmp_path / f"{number}.jsonl" for number in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_reviews([str(path) for path in paths])

    return read


def test_without_files_nobody_has_looked():
    assert read_reviews(None) == read_reviews([]) == Reviews()


def test_the_last_look_of_a_person_counts_wherever_it_stands(reviews):
    early, late = line(verdict="clean"), line(verdict="poisoned", when="2026-03-01T10:00:01Z")
    assert reviews(early + late).verdicts == reviews(late + early).verdicts == {"a.tar/1": "poisoned"}
    assert reviews(late, early).verdicts == {"a.tar/1": "poisoned"}
    zoned = line(verdict="clean", when="2026-03-01T12:00:00+02:00") + line(when="2026-03-01T10:00:01.500")
    assert reviews(zoned).verdicts == {"a.tar/1": "poisoned"}  # the same hour; without a zone it is UTC


def test_of_equal_times_the_later_line_counts(reviews):
    assert reviews(line(verdict="clean") + line(verdict="unsure")).verdicts == {"a.tar/1": "unsure"}


@pytest.mark.parametrize(("one", "other"), itertools.combinations(["poisoned", "clean", "unsure"], 2))
def test_persons_who_differ_are_unsure_and_named(reviews, one, other):
    found = reviews(line(verdict=one), line(verdict=other, who="bob", when="2027-01-01") + line("b.tar/2", "clean"))
    assert found.verdicts == {"a.tar/1": "unsure", "b.tar/2": "clean"}
    assert found.disagreed == ("a.tar/1",)
    assert found.num_looks == 3


def test_the_order_of_lines_of_different_times_changes_nothing():
    looks = [
        Look(name, verdict, who, when)
        for (name, verdict, who), when in zip(
            itertools.product("ab", ("clean", "poisoned"), ("ada", "bob")), range(8), strict=True
        )
    ]
    expected = count_looks(looks)
    assert all(count_looks(some) == expected for some in itertools.islice(itertools.permutations(looks), 0, 40320, 97))


def test_a_torn_last_line_is_counted_and_passed_over_and_one_without_an_end_is_read(reviews, caplog):
    whole = line() + line("b.tar/2", "clean").rstrip("\n")
    assert (reviews(whole).num_looks, reviews(whole).num_torn) == (2, 0)
    for cut in (1, 10, 40):
        torn = reviews(whole[:-cut])
        assert (torn.num_looks, torn.num_torn) == (1, 1)
    assert "its last line, 2, is torn" in caplog.text
    assert reviews(b"\xef\xbb\xbf" + line().replace("\n", "\r\n\r\n").encode()).num_looks == 1


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{", "line 2, is no look"),
        ("[1]", r"it is \[1\]"),
        ("7", "it is 7"),
        ('{"sample_id": "a"}', "it has no verdict, who, when, only 'sample_id'"),
        (line(verdict="Clean").strip(), "its verdict is 'Clean', and should be one of poisoned, clean, unsure"),
        (line(verdict=None).strip(), "its verdict is null, and should be text"),
        (line(who=" ").strip(), 'its who is " ", and should be text'),
        (line(when="yesterday").strip(), "its time is 'yesterday', and should be as 2026-03-01T10:15:00Z"),
        (line(when=1772359200).strip(), "its when is 1772359200, and should be text"),
        ("[" * 100_000, "nested too deeply"),
        (b"\xff\xfe", "line 2, is no look"),
    ],
)
def test_a_line_that_is_no_look_stops_with_file_and_line_and_what_was_expected(reviews, bad, said):
    bad = bad if isinstance(bad, bytes) else bad.encode()
    with pytest.raises(Mistake, match=said) as mistake:
        reviews(line().encode() + bad + b"\n" + line().encode())
    assert "0.jsonl, line 2" in str(mistake.value)
    assert EXAMPLE in str(mistake.value)
    if b'"' in bad:  # whole JSON is never taken for a torn line
        with pytest.raises(Mistake, match=said):
            reviews(line().encode() + bad)


def test_another_file_in_its_place_is_named(reviews, tmp_path):
    with pytest.raises(Mistake, match="is compressed with gzip"):
        reviews(gzip.compress(line().encode()))
    with pytest.raises(Mistake, match=r"there is no file .*none\.jsonl; write looks there"):
        read_reviews(str(tmp_path / "none.jsonl"))
    assert reviews(b"").num_looks == 0


def test_looks_at_samples_that_are_not_of_the_corpus_are_counted_and_named(reviews):
    found = reviews("".join(line(f"gone.tar/{i}", "clean") for i in range(5)) + line("a.tar/1"))
    report = found.report(["a.tar/1", "a.tar/2"])
    assert (report["unknown"], report["unknown_first"]) == (5, ["gone.tar/0", "gone.tar/1", "gone.tar/2"])
    assert (report["looks"], report["poisoned"], report["torn_lines"]) == (6, 1, 0)

"""classes.json, as strangers may have written it."""

from __future__ import annotations

import pytest

from dede_ray.data.captions import read_classes
from dede_ray.data.shards import list_shards
from dede_ray.runtime.config import Mistake


@pytest.mark.parametrize(
    "content", ["no json", "[]", '{"names": ["a"]}', '{"names": [1], "templates": []}', "[" * 100_000]
)
def test_a_classes_json_of_another_kind_is_a_mistake(write_tar, png, tmp_path, content):
    write_tar("s.tar", [("k.png", png())])
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(Mistake, match=r"classes\.json"):
        read_classes(list_shards(str(tmp_path)))

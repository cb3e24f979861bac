"""Weights from strangers: found on disk and on a hub, refused where they would have to be executed."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from dede_ray.models import clip
from dede_ray.models.weights import CONFIG_FILE, PICKLED_WEIGHTS_FILE, WEIGHTS_FILE, read_tensors, resolve_weights
from dede_ray.runtime.config import Mistake, read_json


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Path]:
    """A Hugging Face hub on this machine, which holds `<folder>/<org>/<name>/<file>`."""
    folder = tmp_path / "hub"
    folder.mkdir()

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            repository, _, file = self.path.lstrip("/").partition("/resolve/main/")
            path = folder / repository / file
            error = "RepoNotFound" if not (folder / repository).is_dir() else "EntryNotFound"
            content = path.read_bytes() if path.is_file() else b""
            self.send_response(200 if path.is_file() else 404)
            self.send_header("Content-Length", str(len(content)))
            self.send_header(*(("ETag", f'"{hash(content):x}"') if path.is_file() else ("X-Error-Code", error)))
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if with_body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield folder
    server.shutdown()
    server.server_close()


def upload(hub: Path, name: str, files: dict[str, bytes]) -> None:
    (hub / name).mkdir(parents=True)
    for file, content in files.items():
        (hub / name / file).write_bytes(content)


# --- the hub


def test_a_model_of_the_hub_is_described_and_loaded_by_its_name(hub, victim_folder, tmp_path):
    files = {name: (victim_folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
    upload(hub, "org/tiny", {**files, PICKLED_WEIGHTS_FILE: b"never read"})
    assert clip.model_description("hf-hub:org/tiny") == read_json(victim_folder / CONFIG_FILE, "config")
    model = clip.build_clip(clip.model_description("hf-hub:org/tiny"))
    clip.load_clip_weights(model, "hf-hub:org/tiny")
    own = model.state_dict()
    for name, tensor in load_file(victim_folder / WEIGHTS_FILE).items():
        assert torch.equal(own[name].reshape(tensor.shape), tensor), name
    downloaded = {path.name for path in (tmp_path / "cache").glob("models--org--tiny/snapshots/*/*")}
    assert downloaded == {CONFIG_FILE, WEIGHTS_FILE}


def test_what_was_downloaded_once_is_there_without_a_network(hub, victim_folder, monkeypatch):
    upload(hub, "org/tiny", {WEIGHTS_FILE: (victim_folder / WEIGHTS_FILE).read_bytes()})
    first = resolve_weights("hf-hub:org/tiny")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert resolve_weights("hf-hub:org/tiny") == first
    with pytest.raises(Mistake, match="not in the local cache, and the Hugging Face hub cannot be reached"):
        clip.model_description("hf-hub:org/tiny")


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("hf-hub:org/pickled", f"has no {WEIGHTS_FILE}, only {PICKLED_WEIGHTS_FILE}: opening that would execute code"),
        ("hf-hub:org/empty", "no repository of open_clip's layout"),
        ("hf-hub:org/absent", "shows no repository org/absent"),
        ("hf-hub:a/b/c", "names no repository"),
        ("hf-hub:", "names no repository"),
    ],
)
def test_what_the_hub_cannot_give_is_a_mistake(hub, address, why):
    upload(hub, "org/pickled", {PICKLED_WEIGHTS_FILE: b"a pickle", CONFIG_FILE: b"{}"})
    upload(hub, "org/empty", {"README.md": b""})
    with pytest.raises(Mistake, match=why):
        resolve_weights(address)


# --- files


def test_a_torchscript_archive_is_recognised_without_loading_it(tmp_path):
    class Loud(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    torch.jit.script(Loud()).save(str(tmp_path / "ViT-B-32.pt"))
    content = (tmp_path / "ViT-B-32.pt").read_bytes()
    (tmp_path / "renamed.safetensors").write_bytes(content)
    for name in ("ViT-B-32.pt", "renamed.safetensors"):
        with pytest.raises(Mistake, match="TorchScript archive, code and weights in one") as mistake:
            read_tensors(tmp_path / name)
        assert "open_clip.openai.load_openai_model(path" in str(mistake.value)
    (tmp_path / "cut.pt").write_bytes(content[:-100])  # without the archive's table of contents
    with pytest.raises(Mistake, match=r"no readable checkpoint|execute code"):
        read_tensors(tmp_path / "cut.pt")


def test_a_folder_without_an_export_and_a_name_without_a_file_are_mistakes(tmp_path):
    (tmp_path / PICKLED_WEIGHTS_FILE).write_bytes(b"")
    with pytest.raises(Mistake, match=f"no {WEIGHTS_FILE} in .* only \\['{PICKLED_WEIGHTS_FILE}'\\]"):
        resolve_weights(tmp_path)
    with pytest.raises(Mistake, match=r"no checkpoint at absent\.pt; expected"):
        resolve_weights("absent.pt")
    with pytest.raises(Mistake, match="tag laion2b_s34b_b79k means one of hf-hub:laion/CLIP-ViT-B-32"):
        resolve_weights("laion2b_s34b_b79k")


def test_extra_plain_data_beside_the_tensors_is_no_obstacle(tmp_path):
    state = {"module.weight": torch.ones(2)}
    torch.save({"epoch": 1, "name": "x", "args": {"lr": 1e-3, "tags": ["a"]}, "state_dict": state}, tmp_path / "a.pt")
    assert read_tensors(tmp_path / "a.pt").keys() == state.keys()
    save_file(state, tmp_path / "a.safetensors", metadata={"note": json.dumps({"epoch": 1})})
    assert read_tensors(tmp_path / "a.safetensors").keys() == state.keys()

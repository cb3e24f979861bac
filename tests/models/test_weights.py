"""Weights from strangers: found on disk and on a hub, refused where they would have to be executed."""

from __future__ import annotations

import argparse
import collections
import datetime
import fractions
import http.server
import json
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dede_ray.models import clip
from dede_ray.models.victims import OpenClipVictim, load_victim
from dede_ray.models.weights import (
    CONFIG_FILE,
    PICKLED_WEIGHTS_FILE,
    WEIGHTS_FILE,
    origin,
    read_tensors,
    resolve_weights,
    unwrapped,
)
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
            repository, _, file = self.path.lstrip("/").partition("/resolve/")
            file = file.partition("/")[2]  # after the revision, of which there is one
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
        ("hf-hub:org/empty", f"org/empty on the Hugging Face hub has no {WEIGHTS_FILE}"),
        ("hf-hub:org/absent", "shows no repository org/absent"),
        ("hf-hub:a/b/c", "names no repository"),
        ("hf-hub:", "names no repository"),
    ],
)
def test_what_the_hub_cannot_give_is_a_mistake(hub, address, why):
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
    (tmp_path / "notes.md").write_bytes(b"")
    with pytest.raises(Mistake, match=f"no {WEIGHTS_FILE}.* in .* only \\['notes.md'\\]"):
        resolve_weights(tmp_path)
    with pytest.raises(Mistake, match=r"no checkpoint at absent\.pt; expected"):
        resolve_weights("absent.pt")
    with pytest.raises(Mistake, match="tag laion2b_s34b_b79k means one of hf-hub:laion/CLIP-ViT-B-32"):
        resolve_weights("laion2b_s34b_b79k")
    with pytest.raises(Mistake, match="write hf-hub:somebody/some-clip; expected"):
        resolve_weights("somebody/some-clip")


# --- names


def test_a_name_is_a_repository_a_folder_or_a_file_and_is_located_as_such(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip").mkdir()
    assert origin("clip").located() == origin("local-dir:clip").located() == str(tmp_path / "clip")
    assert origin("~/clip").path == Path.home() / "clip"
    assert origin("local-dir:clip").is_folder
    assert not origin("clip/a.pt").is_folder
    assert origin("s3://bucket/a.pt").located() == "s3://bucket/a.pt"
    remote = origin(f"hf-hub:org/name@{'1' * 40}")
    assert (remote.repository, remote.revision, remote.is_folder) == ("org/name", "1" * 40, True)
    assert remote.located() == remote.name, "its commit is said already"


def test_a_repository_is_located_with_the_commit_that_is_seen(hub, victim_folder, tmp_path, monkeypatch):
    files = {name: (victim_folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
    upload(hub, "org/tiny", files)
    config = OpenClipVictim(path="hf-hub:org/tiny")
    victim = load_victim(config)
    assert victim.fingerprint == load_victim(OpenClipVictim(path=str(victim_folder))).fingerprint
    assert victim.name == f"org/tiny@{'0' * 12}"
    located = config.located()
    address, _, folder = located.path.partition("#")
    assert address == f"hf-hub:org/tiny@{'0' * 40}"
    assert (Path(folder) / WEIGHTS_FILE).is_file()
    with monkeypatch.context() as actor:  # whose cache is another
        actor.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
        assert load_victim(located).fingerprint == victim.fingerprint
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_victim(located).fingerprint == load_victim(config).fingerprint == victim.fingerprint
    both = OpenClipVictim(path="hf-hub:org/tiny", architecture="hf-hub:org/tiny").located()
    assert both.architecture == both.path
    assert load_victim(both).fingerprint == victim.fingerprint
    with pytest.raises(Mistake, match="cannot be reached"):
        load_victim("hf-hub:org/other")


def save(state: dict[str, torch.Tensor], path: Path) -> None:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


@pytest.mark.parametrize(
    "files", [["open_clip_pytorch_model.bin"], ["model.safetensors"], ["pytorch_model.bin"], ["final.safetensors"],
              ["open_clip_model.safetensors", "model.safetensors"], ["model.safetensors", "optimizer.pt"]], ids=str
)  # fmt: skip
def test_a_folder_may_have_its_weights_under_other_names(files, victim_folder, tmp_path):
    state = load_file(victim_folder / WEIGHTS_FILE)
    (tmp_path / CONFIG_FILE).write_bytes((victim_folder / CONFIG_FILE).read_bytes())
    for name in files:
        save(state if name == files[0] else {"other": torch.zeros(1)}, tmp_path / name)
    victim = load_victim(OpenClipVictim(path=f"local-dir:{tmp_path}"))
    assert victim.fingerprint == load_victim(OpenClipVictim(path=str(victim_folder))).fingerprint


@pytest.mark.parametrize("kind", ["open_clip_model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("where", ["folder", "hub"])
def test_split_weights_are_read_by_their_index(kind, where, victim_folder, hub, tmp_path):
    state = load_file(victim_folder / WEIGHTS_FILE)
    folder = hub / "org" / "split" if where == "hub" else tmp_path / "split"
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_bytes((victim_folder / CONFIG_FILE).read_bytes())
    names = sorted(state)
    stem, suffix = kind.rsplit(".", 1)
    files = {name: f"{stem}-0000{1 + i % 2}-of-00002.{suffix}" for i, name in enumerate(names)}
    for file in set(files.values()):
        save({name: state[name] for name in names if files[name] == file}, folder / file)
    index = folder / f"{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    victim = load_victim(OpenClipVictim(path="hf-hub:org/split" if where == "hub" else str(folder)))
    assert victim.fingerprint == load_victim(OpenClipVictim(path=str(victim_folder))).fingerprint
    if where == "hub":
        return
    for wrong, message in (
        ({**files, "more": files[names[0]]}, "1 tensors are in none of its files, such as more"),
        ({**files, names[0]: "absent.bin"}, "absent.bin"),
        ({**files, names[0]: "../elsewhere.bin"}, "should name files beside it"),
        ({**files, names[0]: 3}, "should name files beside it"),
        ([], "should name files beside it"),
    ):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(Mistake, match=message):
            load_victim(OpenClipVictim(path=str(folder)))


# --- what trainers save


STATE = {"visual.weight": torch.ones(2, 2), "visual.bias": torch.zeros(2)}
OTHER = {"visual.weight": torch.zeros(2, 2), "visual.bias": torch.ones(2)}
ADAM = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 2), "exp_avg_sq": torch.ones(2, 2)}},
        "param_groups": [{"lr": 0.1, "params": [0]}]}  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"state_dict": STATE, "epoch": 3, "best_acc1": torch.tensor(0.5)},
        {"model": STATE, "optimizer": ADAM, "model_ema": OTHER},
        {"model_state_dict": STATE, "optimizer_state_dict": ADAM, "loss": 0.5},
        {"net": STATE, "acc": 91.2, "epoch": 5},
        {"state_dict_ema": STATE},
        {"teacher": STATE, "optimizer": ADAM},
        {"weights": {"encoder": STATE}},
        {"model": {"state_dict": STATE}, "metrics": {"loss": torch.tensor(1.0)}},
        {**STATE, "epoch": 3, "arch": "RN50"},
        {"state_dict": STATE, "queue": torch.zeros(4, 4)},
        {"my_own_name": STATE, "opt_d": None, "rng": torch.tensor(0)},
    ],
    ids=lambda content: "+".join(content),
)
def test_the_network_is_found_among_what_trainers_keep(content, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    read = read_tensors(tmp_path / "a.pt")
    assert {name: tensor for name, tensor in read.items() if tensor.ndim}.keys() == STATE.keys()
    assert all(torch.equal(read[name], STATE[name]) for name in STATE)


def test_of_several_networks_a_person_chooses(tmp_path):
    torch.save({"student": OTHER, "teacher": STATE, "epoch": 1}, tmp_path / "a.pt")
    with pytest.raises(Mistake, match=r"several state dicts: student \(2 tensors\), teacher \(2 tensors\); set entry"):
        read_tensors(tmp_path / "a.pt")
    assert torch.equal(read_tensors(tmp_path / "a.pt", "teacher")["visual.bias"], STATE["visual.bias"])
    with pytest.raises(Mistake, match="no entry 'tutor', only student"):
        read_tensors(tmp_path / "a.pt", "tutor")
    flat = {f"{who}.{name}": t for who, state in (("student", OTHER), ("teacher", STATE)) for name, t in state.items()}
    torch.save(flat, tmp_path / "b.pt")
    assert torch.equal(read_tensors(tmp_path / "b.pt", "teacher")["visual.bias"], STATE["visual.bias"])
    with pytest.raises(Mistake, match=r"several networks, student\., teacher\.; set entry"):
        unwrapped(read_tensors(tmp_path / "b.pt"), lambda names: names.keys() >= STATE.keys(), tmp_path / "b.pt")


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "clip.", "model.module.", "net.encoder.", "x.y."]
)
def test_what_wrappers_put_before_every_name_is_no_obstacle(prefix, tmp_path):
    state = {prefix + name: tensor for name, tensor in STATE.items()}
    assert unwrapped(state, lambda names: names.keys() >= STATE.keys(), tmp_path).keys() == STATE.keys()
    if prefix != "_orig_mod.":
        state["criterion.weight"] = torch.zeros(3)
        assert unwrapped(state, lambda names: names.keys() >= STATE.keys(), tmp_path).keys() == STATE.keys()
    inside = {"visual._orig_mod.weight": STATE["visual.weight"], "visual._orig_mod.bias": STATE["visual.bias"]}
    assert unwrapped(inside, lambda names: names.keys() >= STATE.keys(), tmp_path).keys() == STATE.keys()
    assert unwrapped({"module.model.a": torch.ones(1)}, lambda _: False, tmp_path).keys() == {"a"}


class Loud:
    """Says so when it is made: what is read must never be."""

    made = 0

    def __init__(self, *_: object):
        Loud.made += 1

    def __reduce__(self):
        return Loud, ()


class LoudDict(dict):
    pass


NOTES = {
    "numpy_number": np.float64(0.5), "numpy_array": np.arange(3), "numpy_objects": np.array([None, "a"]),
    "namespace": argparse.Namespace(lr=0.1, arch="RN50", path=Path("a")), "path": Path("a/b"),
    "date": datetime.datetime(2024, 1, 1), "defaultdict": collections.defaultdict(list, {"a": [1]}),
    "own_class": Loud(), "own_dict": LoudDict(a=1), "function": print, "type": torch.nn.Linear, "dtype": torch.float16,
    "named_tuple": collections.namedtuple("Point", "x y"), "range": range(3), "fraction": fractions.Fraction(1, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in NOTES if name not in ("function", "named_tuple")])
@pytest.mark.parametrize("is_old", [False, True])
def test_objects_beside_the_tensors_are_left_out_and_never_made(name, is_old, tmp_path):
    if is_old and name == "type":
        pytest.skip("old files keep a class as its source, which torch does not read")
    content = {"note": NOTES[name], "state_dict": STATE, "more": {"note": [NOTES[name]]}}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not is_old)
    before = Loud.made
    assert read_tensors(tmp_path / "a.pt").keys() == STATE.keys()
    assert Loud.made == before


def test_a_state_dict_of_another_kind_of_dict_is_read(tmp_path):
    for i, kind in enumerate((collections.OrderedDict, lambda state: collections.defaultdict(list, state), LoudDict)):
        torch.save({"model": kind(STATE)}, tmp_path / f"{i}.pt")
        assert read_tensors(tmp_path / f"{i}.pt").keys() == STATE.keys()


class Whole(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2))
        self.tied = self.visual[0].weight
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.activation = torch.nn.functional.relu

    def __setstate__(self, state: dict) -> None:
        raise AssertionError("its code was executed")


@pytest.mark.parametrize("wrap", [lambda whole: whole, lambda whole: {"model": whole, "epoch": 1}])
def test_of_a_pickled_network_the_tensors_are_read_and_the_code_is_not_run(wrap, tmp_path):
    whole = Whole()
    torch.save(wrap(whole), tmp_path / "a.pt")
    read, own = read_tensors(tmp_path / "a.pt"), whole.state_dict()
    assert all(torch.equal(read[name], own[name]) for name in own if name != "tied")


@pytest.mark.parametrize(
    "name", ["os.system", "subprocess.Popen", "builtins.eval", "builtins.getattr", "shutil.rmtree"]
)
def test_a_file_that_asks_for_what_no_checkpoint_needs_is_refused_by_its_name(name, tmp_path):
    module, word = name.split(".")
    target = getattr(__import__(module), word)

    class Bomb:
        def __reduce__(self):
            return target, (str(tmp_path / "exploded"),)

    torch.save({"state_dict": STATE, "note": Bomb()}, tmp_path / "a.pt")
    with pytest.raises(Mistake, match=rf"more than tensors \(.*{word}\): opening it would execute code"):
        read_tensors(tmp_path / "a.pt")


def test_a_pickle_of_another_kind_is_refused_by_what_it_has(tmp_path):
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"weights": np.ones(3)}, protocol=2))
    with pytest.raises(Mistake, match=r"no dict of tensors|no readable checkpoint"):
        read_tensors(tmp_path / "a.pt")
    torch.save(STATE, tmp_path / "b.pt", pickle_protocol=5)
    with pytest.raises(Mistake, match="Unsupported operand"):
        read_tensors(tmp_path / "b.pt")


# --- what stands in a file's place


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors", "a", "a.bin"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "pointer of Git LFS"),
        (b"<!doctype html><html><body>Access restricted</body></html>", "web page"),
        (b"\x28\xb5\x2f\xfd rest", "Zstandard"),
        (b"\x1f\x8b rest", "gzip"),
        (b'{"error": "gated"}', "JSON"),
        (b"\x89HDF\r\n\x1a\n rest", "HDF5"),
        (b"", "empty"),
    ],
)
def test_what_stands_in_a_checkpoints_place_is_named(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Mistake, match=said) as mistake:
        read_tensors(tmp_path / name)
    assert "execute" not in str(mistake.value)


@pytest.mark.parametrize("kind", ["open_clip", "encoder", "transformers", "timm", "onnx"])
def test_what_stands_in_the_place_of_a_config_or_a_network_is_named(kind, tmp_path):
    names = {"open_clip": "open_clip_config.json", "encoder": "encoder.json", "onnx": "model.onnx"}
    (tmp_path / names.get(kind, "config.json")).write_text("version https://git-lfs.github.com/spec/v1\nsize 1\n")
    more = {"onnx": {"normaliser": "none"}}
    with pytest.raises(Mistake, match="a pointer of Git LFS, not the file itself: run `git lfs pull`"):
        load_victim({"kind": kind, "path": str(tmp_path), **more.get(kind, {})})


def test_an_archive_of_numpys_arrays_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", weight=np.zeros(3))
    with pytest.raises(Mistake, match="is an archive of NumPy arrays"):
        read_tensors(tmp_path / "a.npz")


def test_a_checkpoint_is_read_by_its_bytes_whatever_its_name(tmp_path):
    for name in ("a.pt", "a", "a.ckpt"):
        save_file(STATE, tmp_path / name)
        assert read_tensors(tmp_path / name).keys() == STATE.keys()
        torch.save(STATE, tmp_path / name)
        assert read_tensors(tmp_path / name).keys() == STATE.keys()
    torch.save(STATE, tmp_path / "a.safetensors")
    with pytest.raises(Mistake, match=r"bytes of a \.pt file; rename it"):
        read_tensors(tmp_path / "a.safetensors")


def test_extra_plain_data_beside_the_tensors_is_no_obstacle(tmp_path):
    state = {"module.weight": torch.ones(2)}
    torch.save({"epoch": 1, "name": "x", "args": {"lr": 1e-3, "tags": ["a"]}, "state_dict": state}, tmp_path / "a.pt")
    assert read_tensors(tmp_path / "a.pt").keys() == state.keys()
    save_file(state, tmp_path / "a.safetensors", metadata={"note": json.dumps({"epoch": 1})})
    assert read_tensors(tmp_path / "a.safetensors").keys() == state.keys()

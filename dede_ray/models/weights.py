"""Weights that strangers made: finding them, here or on the Hugging Face hub, and reading them without executing code.

`origin` says what a name names: a file, a folder, or a repository of the hub. `read_tensors` gives a checkpoint's
tensors, and only those: of safetensors, and of .pt files by torch's restricted unpickler, in which everything that is
no tensor has an inert stand-in. An export of ours is a folder of tensors beside a JSON description: `write_export`
writes it, `read_export` refuses what is damaged.
"""

from __future__ import annotations

import logging
import math
import pickle
import re
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dede_ray.data.first_bytes import NUM_BYTES, what_is
from dede_ray.runtime.config import Config, Mistake, explain, read_json, write_json
from dede_ray.runtime.libraries import open_clip
from dede_ray.runtime.store import Named, is_url, local_copy

logger = logging.getLogger(__name__)

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"
PICKLED_WEIGHTS_FILE = "open_clip_pytorch_model.bin"  # open_clip's name for it on the hub
HUB = "hf-hub:"  # open_clip's prefix of a repository on the Hugging Face hub
INDEX = ".index.json"  # says which of several files holds which tensor
OPEN_CLIP_WEIGHTS = (WEIGHTS_FILE, PICKLED_WEIGHTS_FILE, "model.safetensors", "pytorch_model.bin")
"""Under these names a folder or a repository has the weights, the first that is there; each may be split."""

C = TypeVar("C", bound=Config)


# ------------------------------------------------------------------------------------------------ finding


@dataclass(frozen=True)
class Origin:
    """Where a model comes from: a file or a folder of this machine, or a repository of the hub."""

    name: str
    """As a person wrote it."""
    path: Path | None
    """The file or folder, there or not; None for a repository."""
    repository: str = ""
    revision: str | None = None

    @property
    def is_folder(self) -> bool:
        """Whether it may hold several files: a folder, or a repository."""
        return self.path is None or self.path.is_dir()

    @property
    def exists(self) -> bool:
        return self.path is None or is_url(self.name) or self.path.exists()

    def find(self, *names: str) -> Path | None:
        """The first of these files that a folder or a repository has, from the hub's cache where it lies there."""
        try:
            return self.file(*names)
        except FileNotFoundError:
            return None

    def file(self, *names: str) -> Path:
        """The same.

        Raises:
            FileNotFoundError: it has none of them, or the hub cannot be reached; the message is for people.
            Mistake: there is no such repository, or the hub does not give the file.
        """
        unreachable = None
        for name in names:
            if self.path is not None:
                if (self.path / name).is_file():
                    return self.path / name
                continue
            try:
                return _download(self, name)
            except EntryNotFoundError as error:
                unreachable = unreachable or (error if isinstance(error, FileNotFoundError) else None)
        listed = " or ".join(names)
        if unreachable:  # the hub's "not in the cache either"
            raise FileNotFoundError(
                f"{listed} of {self.repository} is not in the local cache, and the Hugging Face hub cannot be "
                f"reached; download it where there is a network, and name the folder ({unreachable})"
            )
        if self.path is None:
            raise FileNotFoundError(f"{self.repository} on the Hugging Face hub has no {listed}")
        found = sorted(file.name for file in self.path.iterdir())[:10] if self.path.is_dir() else []
        raise FileNotFoundError(f"no {listed} in {self.path}, only {found}")

    def weights(self, *names: str) -> Path:
        """The local file of weights, or the index of those that are split.

        Args:
            names: those it may have in a folder or repository, best first.

        Raises:
            Mistake: nothing there.
        """
        if not self.is_folder:
            path = local_copy(self.name) if is_url(self.name) else self.path
            if path is None or not path.is_file():
                raise Mistake(
                    f"no checkpoint at {self.name}{_behind_tag(self.name)}{self.hint()}; expected a .safetensors or "
                    f"tensor-only .pt file, an exported folder, or {HUB}<org>/<name>"
                )
            return path
        try:
            return self.file(*(name + suffix for name in names for suffix in ("", INDEX)))
        except FileNotFoundError as error:
            for suffixes in ({".safetensors"}, {".bin", ".pt", ".pth", ".ckpt"}):
                inside = self.path.iterdir() if self.path else ()
                if len(only := [file for file in inside if file.suffix in suffixes]) == 1:
                    return only[0]
            raise Mistake(f"{error}; name an exported folder or a checkpoint file") from None

    def located(self) -> str:
        """The name for other processes, whose working folder may be another: an absolute path, or a repository with
        the commit that this process sees and, after a `#`, its folder here, for those to whom the hub's cache, or the
        hub, is not where it is for this process."""
        if self.path is None:
            folder = _snapshot(self)
            return f"{self.name.partition('@')[0]}@{folder.name}#{folder}" if folder else self.name
        return self.name if is_url(self.name) else str(self.path.absolute())

    def hint(self) -> str:
        """What to write instead, where nothing is there and the name looks like a repository's."""
        is_like_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", self.name) and not Path(self.name).suffix
        return f"; if it is a repository of the Hugging Face hub, write {HUB}{self.name}" if is_like_hub else ""


def origin(name: str | Path) -> Origin:
    """What a name names: `hf-hub:<org>/<name>` (with `@<commit>` or not), `local-dir:<folder>`, a folder, or a file,
    which may be an object on a store."""
    text = str(name)
    if text.startswith(HUB):
        text, _, folder = text.partition("#")
        if folder and Path(folder).is_dir():
            return Origin(text, Path(folder))
        repository, _, revision = text.removeprefix(HUB).partition("@")
        return Origin(text, None, repository, revision or None)
    text = text.removeprefix("local-dir:")
    return Origin(text, Path(text).expanduser())


def pinned(name: str) -> str:
    """A repository's name with the commit that this process sees; any other name as it is."""
    place = origin(name)
    if place.path is not None or place.revision is not None:
        return name
    folder = _snapshot(place)
    return f"{name}@{folder.name}" if folder else name


def _snapshot(place: Origin) -> Path | None:
    """The folder of a repository in the hub's cache, named by its commit."""
    found = place.find(CONFIG_FILE, "config.json", *OPEN_CLIP_WEIGHTS)
    return next((one for one in found.parents if one.parent.name == "snapshots"), None) if found else None


def read_config(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object beside weights; where something else stands in its place, say what that is."""
    try:
        return read_json(path, what)
    except Mistake:
        if path.is_file():
            with path.open("rb") as file:
                kind = what_is(file.read(NUM_BYTES))
            if kind not in (None, "JSON"):
                raise Mistake(f"{path} is no {what}, but {kind}") from None
        raise


def resolve_weights(init: str | Path) -> Path:
    """The local file behind an `init` setting, or the index of several.

    Args:
        init: a .safetensors file, a tensor-only .pt file or a training checkpoint of open_clip's, an exported folder,
            or `hf-hub:<org>/<name>`, of which only config and weights are downloaded (or found in the hub's cache).

    Raises:
        Mistake: nothing there.
    """
    return origin(init).weights(*OPEN_CLIP_WEIGHTS)


def other_layout(place: Origin) -> str:
    """A hint for a folder or repository that is none of open_clip's: whose it is, and which kind of victim reads it."""
    if place.find("encoder.json"):
        return "; it is an encoder's: set victim.kind to encoder"
    config = read_config(found, "config of a network") if (found := place.find("config.json")) else {}
    for key, library in (("model_type", "transformers"), ("architecture", "timm")):
        if isinstance(config.get(key), str):
            return f"; it is a network of {library}'s ({config[key]}): set victim.kind to {library}"
    return ""


def _behind_tag(tag: str) -> str:
    """Repositories of the weights that open_clip's users know by a tag such as `laion2b_s34b_b79k`."""
    models = [model for model, known in open_clip.list_pretrained() if known == tag]
    known = {open_clip.get_pretrained_cfg(model, tag).get("hf_hub", "") for model in models}
    repositories = sorted(HUB + address.strip("/") for address in known if address)
    return f"; open_clip's tag {tag} means one of {', '.join(repositories[:8])}" if repositories else ""


def _download(place: Origin, filename: str) -> Path:
    """One file of a repository; EntryNotFoundError where it has none, or where nothing is known of it here."""
    repository = place.repository
    try:
        return Path(huggingface_hub.hf_hub_download(repository, filename, revision=place.revision))
    except HFValidationError as error:
        raise Mistake(f"{place.name} names no repository of the hub; expected {HUB}<org>/<name>: {error}") from None
    except RepositoryNotFoundError:
        raise Mistake(
            f"the Hugging Face hub shows no repository {repository}; correct the name or, if it is private or gated, "
            "log in with `hf auth login`"
        ) from None
    except EntryNotFoundError:
        raise
    except HfHubHTTPError as error:
        raise Mistake(f"the Hugging Face hub did not give {filename} of {repository}: {error}") from None


# ------------------------------------------------------------------------------------------------ reading


class Budget(TorchDispatchMode):
    """Lets tensors be made of so many bytes together; each is charged for at least 64 KiB, any other step for 1 KiB."""

    def __init__(self, num_bytes: int):
        super().__init__()
        self._left = num_bytes

    @classmethod
    def for_weights(cls, path: Path) -> Budget:
        """Enough for the network of this checkpoint, but for none that is far larger."""
        return cls(4 * sum(part.stat().st_size for part in _parts(path)) + 2**28)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        charge = 2**10
        if args and not any(isinstance(value, Tensor) for value in args):  # it makes a tensor out of numbers
            sides = args[0] if isinstance(args[0], list | tuple) else [value for value in args if type(value) is int]
            charge = max(4 * math.prod(sides), 2**16)
        self._left -= charge
        if self._left < 0:
            raise ValueError("it describes a far larger model than the weights beside it")
        return func(*args, **(kwargs or {}))


def _parts(path: Path) -> list[Path]:
    """The files of a checkpoint: itself, or those that an index names.

    Raises:
        Mistake: the index is damaged, names files elsewhere, or files that are not there.
    """
    if not path.name.endswith(INDEX):
        return [path]
    files = read_config(path, "index of split weights").get("weight_map")
    names = sorted(set(files.values())) if isinstance(files, dict) and _are_names(files.values()) else []
    if not names or any(Path(name).name != name or name.endswith(INDEX) for name in names):
        raise Mistake(f"{path} is no index of split weights: its weight_map should name files beside it")
    place = _beside(path)
    try:
        files = [place(name) for name in names]
    except FileNotFoundError as error:
        raise Mistake(f"{path} names weights that are not there: {error}") from None
    if absent := [file for file in files if not file.is_file()]:
        raise Mistake(f"{path} names weights that are not there: {absent[0]}")
    return files


def _are_names(values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _beside(path: Path) -> Callable[[str], Path]:
    """How to get the files beside one: of a repository they may have to be downloaded."""
    parts = path.parts

    def get(name: str) -> Path:
        if (path.parent / name).is_file() or "snapshots" not in parts:
            return path.parent / name
        at = parts.index("snapshots")
        repository = parts[at - 1].removeprefix("models--").replace("--", "/")
        return Origin(name, None, repository, parts[at + 1]).file(name)

    return get


def read_tensors(path: Named, entry: str | None = None) -> dict[str, Tensor]:
    """Read a checkpoint's tensors without executing anything in it.

    Accepts safetensors, split ones by their index, and `.pt` files, whatever their names: a state dict, or one among
    what trainers keep beside it. What is neither number, text nor tensor is left out.

    Args:
        path: the file.
        entry: which state dict, where there are several, such as `teacher`, or `model.encoder` of nested ones; or the
            first part of the names of a network's tensors, where several networks are in one state dict.

    Raises:
        Mistake: no such file, damaged, several state dicts, or a file that only unpickling could open.
    """
    named, path = path, local_copy(path)
    if not path.is_file():
        raise Mistake(f"no checkpoint at {named}")
    parts = [_content(part) for part in _parts(path)]
    state = _chosen(_state_dicts(parts[0] if len(parts) == 1 else _merged(parts, path)), path, entry)
    for name, tensor in state.items():
        if not _is_plain(tensor):
            raise Mistake(f"{path} holds {name!r}, which is no plain tensor; save a state dict of dense CPU tensors")
    return state


def _merged(parts: list[Any], path: Path) -> dict[str, Any]:
    if not all(isinstance(part, dict) for part in parts):
        raise Mistake(f"{path}: not all the files that it names are state dicts")
    merged = {name: value for part in parts for name, value in part.items()}
    if missing := sorted(read_json(path, "index of split weights")["weight_map"].keys() - merged.keys()):
        raise Mistake(f"{path}: {len(missing)} tensors are in none of its files, such as {missing[0]}")
    return merged


def _content(path: Path) -> Any:
    """What a file holds, with stand-ins for everything that would have to be executed."""
    with path.open("rb") as file:
        what = what_is(file.read(NUM_BYTES))
    if path.suffix == ".onnx" and what is None:
        raise Mistake(f"{path} is an ONNX network; set victim.kind to onnx")
    if what is None and path.suffix == ".safetensors":
        what = "safetensors"
    if what is None:
        raise Mistake(f"{path} is no readable checkpoint: its first bytes are of no format that we know")
    if what not in ("safetensors", "a ZIP archive", "a Python pickle", "a tar"):
        raise Mistake(f"{path} is no readable checkpoint, but {what}")
    if what == "safetensors":
        try:
            return load_file(path)
        except Exception as error:  # its reader raises whatever damage makes it meet
            raise Mistake(f"{path} is no readable checkpoint: {error!r}") from None
    members = _members(path)
    names = [member.filename.split("/", 1)[-1] for member in members]
    if names and all(name.endswith(".npy") for name in names):
        raise Mistake(f"{path} is an archive of NumPy arrays, not of tensors; write them by safetensors.numpy")
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise Mistake(
            f"{path} is a TorchScript archive, code and weights in one, as OpenAI published CLIP; loading it would "
            "execute that code, so we do not. Convert it once, where you trust it: "
            "model = open_clip.openai.load_openai_model(path, precision='fp32', device='cpu'); "
            "torch.save(model.state_dict(), 'clip.pt'); and name the architecture with OpenAI's activation, such as "
            "ViT-B-32-quickgelu. Or take the safetensors of hf-hub:timm/vit_base_patch32_clip_224.openai and its like"
        )
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise Mistake(f"{path} is compressed, which torch.save never does; unpacked it may be of any size")
    if path.suffix == ".safetensors":
        raise Mistake(f"{path} is no readable checkpoint: it has the bytes of a .pt file; rename it to .pt")
    return _unpickled(path, is_archive=bool(members))


class _StandIn:
    """Takes the place of any object of a checkpoint that is no tensor: it keeps its state, and does nothing."""

    state: Any = None

    def __init__(self, *_: Any):
        pass

    def __new__(cls, *_: Any) -> _StandIn:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _DictStandIn:
    """The same for kinds of dicts, which the restricted unpickler fills only where they are plain."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


_MET = re.compile(r"GLOBAL (.+?) (?:was not an allowed|whose module)")
_HARMLESS_BUILTINS = {"bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range",
                      "set", "slice", "str", "tuple"}  # fmt: skip
_ATTACKS = {"commands", "ctypes", "importlib", "marshal", "multiprocessing", "nt", "os", "pickle", "posix", "pty",
            "runpy", "shutil", "socket", "subprocess", "sys"}  # fmt: skip
_MAX_GLOBALS = 100


def _unpickled(path: Path, is_archive: bool) -> Any:
    """A .pt file by torch's restricted unpickler; each name that it meets and does not know gets a stand-in.

    A file that names what no checkpoint needs, such as os.system, is an attack and refused.
    """
    met: dict[str, Any] = {}
    while True:
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals([(met[name], name) for name in met]):
                warnings.simplefilter("ignore")  # about pickle protocols, just before it refuses them
                # Mapped, a tensor is a piece of the file. Unmapped, torch would inflate zip bombs, and read as many
                # bytes behind a record as the pickle says.
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
            break
        except pickle.UnpicklingError as error:
            found = _MET.search(str(error))
            name = found[1] if found else ""
            is_builtin = name in _HARMLESS_BUILTINS
            is_harmless = is_builtin or ("." in name and name.split(".")[0] not in _ATTACKS)
            if is_harmless and len(met) < _MAX_GLOBALS:
                stand_in = _DictStandIn if "dict" in name.lower() else _StandIn
                met[f"builtins.{name}" if is_builtin else name] = stand_in
                continue
            said = re.search(r"WeightsUnpickler error:\s*([^\n]+)", str(error))
            reason = name or (said[1] if said else str(error).strip().splitlines()[0])
            raise Mistake(
                f"{path} holds more than tensors ({', '.join([*met, reason][-5:])}): opening it would execute code "
                "from whoever made it, so we do not. Ask for safetensors, or convert it where you trust it: "
                "torch.save(model.state_dict(), path)"
            ) from None
        except Exception as error:  # whatever damage makes it meet: IndexError, KeyError, struct.error
            beside = f"; it holds {', '.join([*met][-5:])}, which are not opened" if met else ""
            raise Mistake(f"{path} is no readable checkpoint: {error!r}{beside}") from None
    if met:
        logger.info("%s: beside its tensors, left out: %s", path, ", ".join(met))
    return content


USUAL_ENTRIES = ("state_dict", "model_state_dict", "model", "net", "network", "module")
"""Where trainers keep the network itself, whatever else they keep."""
_OPTIMISER = re.compile("optim|sched|scaler", re.IGNORECASE)


def _state_dicts(content: Any) -> dict[str, dict[str, Tensor]]:
    """Every dict of tensors of a checkpoint by its place, such as `model.state_dict`, but those of optimisers.

    A whole pickled network counts as the dict of its parameters and buffers.
    """
    found: dict[str, dict[str, Tensor]] = {}
    seen: set[int] = set()

    def look(value: Any, place: tuple[str, ...]) -> None:
        if isinstance(value, _StandIn):
            value = _of_network(value, seen)
        if not isinstance(value, dict) or id(value) in seen or len(place) > 4:
            return
        seen.add(id(value))
        tensors = {name: tensor for name, tensor in value.items() if isinstance(tensor, Tensor)}
        if tensors and _are_names(tensors):
            found[".".join(place)] = tensors
        for name, inner in value.items():
            if isinstance(name, str) and not _OPTIMISER.search(name):
                look(inner, (*place, name))

    look(content, ())
    return found


def _of_network(stand_in: _StandIn, seen: set[int], prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a pickled torch.nn.Module, under the names that its state dict would give them."""
    state = stand_in.state
    if not isinstance(state, dict) or id(stand_in) in seen or prefix.count(".") > 50:
        return {}
    seen.add(id(stand_in))
    tensors = {}
    for kind in ("_parameters", "_buffers", "_modules"):
        members = state.get(kind)
        for name, value in members.items() if isinstance(members, dict) and _are_names(members) else ():
            if isinstance(value, Tensor):
                tensors[prefix + name] = value.data
            elif isinstance(value, _StandIn) and kind == "_modules":
                tensors |= _of_network(value, seen, f"{prefix}{name}.")
    return tensors


def _chosen(found: dict[str, dict[str, Tensor]], path: Path, entry: str | None) -> dict[str, Tensor]:
    """The state dict that is meant: `entry`, or the one that trainers call so, or the only one."""
    if entry is not None:
        if entry in found:
            return found[entry]
        for state in found.values():
            if below := {name[len(entry) + 1 :]: state[name] for name in state if name.startswith(f"{entry}.")}:
                return below
    # Beside a network lie single numbers: a loss, a step. And of a dict in a dict, the larger one is the network.
    large = {place: state for place, state in found.items() if any(tensor.ndim for tensor in state.values())}
    large = {
        place: state
        for place, state in large.items()
        if not any(len(large[other]) > len(state) and _is_within(place, other) for other in large)
    } or found
    usual = [place for place in large if place.rsplit(".", 1)[-1] in USUAL_ENTRIES]
    listed = ", ".join(f"{place or 'the whole'} ({len(state)} tensors)" for place, state in sorted(large.items())[:10])
    if entry is not None:
        raise Mistake(f"{path} has no entry {entry!r}, only {listed or 'none with tensors'}")
    if not large:
        raise Mistake(f"{path} is no state dict: no dict of tensors is in it")
    if len(large) > 1 and len(usual) != 1:
        raise Mistake(f"{path} holds several state dicts: {listed}; set entry to one of them")
    if len(large) > 1:
        logger.info("%s: its entry %s is taken, of %s", path, usual[0], listed)
    return large[usual[0] if len(large) > 1 else next(iter(large))]


def _is_within(place: str, other: str) -> bool:
    """Whether one place is below the other, or above it."""
    return not place or not other or f"{place}.".startswith(f"{other}.") or f"{other}.".startswith(f"{place}.")


_INNER_WRAPPERS = re.compile(r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
_OUTER_WRAPPERS = ("module.", "model.", "clip.", "net.", "network.")


def unwrapped(
    state: dict[str, Tensor], is_network: Callable[[Mapping[str, Tensor]], bool], path: Path
) -> dict[str, Tensor]:
    """A network's tensors under its own names, without what wrappers and trainers put before them.

    Args:
        state: as `read_tensors` gave it.
        is_network: whether these are the names of the network that is looked for; more may be among them.
        path: where they are from.

    Returns:
        The tensors below the shortest prefix under which the network is; without the usual wrappers' prefixes where it
        is nowhere, for the message that it does not fit.

    Raises:
        Mistake: it is there several times.
    """
    state = {_INNER_WRAPPERS.sub(r"\1", name): tensor for name, tensor in state.items()}
    found = _below(state, is_network, "")
    if len(found) > 1:
        raise Mistake(f"{path} holds several networks, {', '.join(sorted(found))}; set entry to one of them")
    for prefix, tensors in found.items():
        if left := len(state) - len(tensors):
            logger.info("%s: %s is taken, %d tensors beside it are not", path, prefix, left)
        return tensors
    while wrapper := next((one for one in _OUTER_WRAPPERS if state and all(n.startswith(one) for n in state)), None):
        state = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
    return state


def _below(
    state: dict[str, Tensor], is_network: Callable[[Mapping[str, Tensor]], bool], prefix: str
) -> dict[str, dict[str, Tensor]]:
    if is_network(state):
        return {prefix: state}
    if prefix.count(".") > 5:
        return {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        first, dot, rest = name.partition(".")
        if dot:
            parts.setdefault(first, {})[rest] = tensor
    return {
        place: found for first, part in parts.items()
        for place, found in _below(part, is_network, f"{prefix}{first}.").items()
    }  # fmt: skip


def _is_plain(tensor: Tensor) -> bool:
    """Dense numbers that are all in the file; up to 1 GB also an expanded tensor, for which one number is enough."""
    return (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and tensor.numel() * tensor.element_size() <= max(tensor.untyped_storage().nbytes(), 2**30)
    )


def unlike(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that are missing, unexpected, of another shape, or no floats where floats are wanted."""
    return sorted(
        name
        for name in wanted.keys() | state.keys()
        if name not in state
        or name not in wanted
        or state[name].shape != wanted[name].shape
        or (wanted[name].is_floating_point() and not state[name].is_floating_point())
    )


def refuse_unlike(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path, description: str) -> None:
    """Raise a Mistake where a file's tensors are not those that the JSON file beside it describes."""
    if wrong := unlike(state, wanted):
        raise Mistake(
            f"{path} does not fit its {description}: {len(wrong)} tensors are missing, unexpected, or of another shape "
            f"or kind, such as {wrong[:3]}"
        )


def refuse_not_finite(model: nn.Module, path: str | Path) -> None:
    """Raise a Mistake where a loaded model's weights are not all numbers: all it computes would be none."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise Mistake(f"{path} holds NaN or infinity in {name}; nothing can be computed with it")


def write_export(
    folder: str | Path, weights: str, state: Mapping[str, Tensor], description: str, content: dict[str, Any]
) -> None:
    """Write a folder of tensors and settings, nothing executable: the file `weights`, then the file `description`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}, folder / f".{weights}")
    (folder / f".{weights}").replace(folder / weights)
    write_json(folder / description, content)


def read_export(
    folder: str | Path, weights: str, description: str, kind: type[C], what: str
) -> tuple[C, dict[str, Tensor]]:
    """Read what `write_export` wrote, the description checked; whether the tensors fit it is for the caller to check.

    Args:
        what: what was exported, such as "encoder", for the error message.

    Raises:
        Mistake: nothing there, damaged, or absurd settings.
    """
    path = Path(folder) / description
    content = read_config(path, f"exported {what} ({description})")
    try:
        described = kind.model_validate(content)
    except ValidationError as error:
        raise Mistake(f"{path} does not describe an exported {what}:\n{explain(error, kind)}") from None
    return described, read_tensors(Path(folder) / weights)


def _members(path: Path) -> list[zipfile.ZipInfo]:
    """The table of contents of an archive, as torch.save writes it; empty where the file is none, or damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error):
        return []  # its reader will report the damage

"""Weights that strangers made: finding them, here or on the Hugging Face hub, and reading them without executing code.

Only tensors are read: safetensors, and those .pt files that torch's restricted unpickler accepts. An export of ours is
a folder of tensors beside a JSON description: `write_export` writes it, `read_export` refuses what is damaged.
"""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
import torch
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dede_ray.runtime.config import Config, Mistake, explain, read_json, write_json
from dede_ray.runtime.libraries import open_clip
from dede_ray.runtime.store import Named, local_copy

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"
PICKLED_WEIGHTS_FILE = "open_clip_pytorch_model.bin"  # open_clip's name for it on the hub; never opened here
HUB = "hf-hub:"  # open_clip's prefix of a repository on the Hugging Face hub

C = TypeVar("C", bound=Config)


def resolve_weights(init: str | Path) -> Path:
    """The local file behind an `init` setting.

    Args:
        init: a .safetensors file, a tensor-only .pt file or a training checkpoint of open_clip's, an exported folder,
            or `hf-hub:<org>/<name>`, of which only the safetensors are downloaded (or found in the hub's cache).

    Raises:
        Mistake: nothing there, or only weights that would have to be unpickled.
    """
    name = str(init)
    path = Path(name.removeprefix("local-dir:"))
    if name.startswith(HUB):
        return download(name, WEIGHTS_FILE)
    if path.is_dir():
        if not (path / WEIGHTS_FILE).is_file():
            found = sorted(file.name for file in path.iterdir())[:10]
            raise Mistake(f"no {WEIGHTS_FILE} in {path}, only {found}; name an exported folder or a checkpoint file")
        return path / WEIGHTS_FILE
    if not path.is_file():
        raise Mistake(
            f"no checkpoint at {name}{_behind_tag(name)}; expected a .safetensors or tensor-only .pt file, an exported "
            f"folder, or {HUB}<org>/<name>"
        )
    return path


def _behind_tag(tag: str) -> str:
    """Repositories of the weights that open_clip's users know by a tag such as `laion2b_s34b_b79k`."""
    models = [model for model, known in open_clip.list_pretrained() if known == tag]
    known = {open_clip.get_pretrained_cfg(model, tag).get("hf_hub", "") for model in models}
    repositories = sorted(HUB + address.strip("/") for address in known if address)
    return f"; open_clip's tag {tag} means one of {', '.join(repositories[:8])}" if repositories else ""


def download(address: str, filename: str) -> Path:
    """One file of a repository on the hub, from the hub's local cache where it lies there."""
    repository = address.removeprefix(HUB)
    try:
        return Path(huggingface_hub.hf_hub_download(repository, filename))
    except HFValidationError as error:
        raise Mistake(f"{address} names no repository of the hub; expected {HUB}<org>/<name>: {error}") from None
    except RepositoryNotFoundError:
        raise Mistake(
            f"the Hugging Face hub shows no repository {repository}; correct the name or, if it is private or gated, "
            "log in with `hf auth login`"
        ) from None
    except FileNotFoundError as error:  # the hub's "not in the cache either"
        raise Mistake(
            f"{filename} of {repository} is not in the local cache, and the Hugging Face hub cannot be reached; "
            f"download it where there is a network, and name the folder ({error})"
        ) from None
    except EntryNotFoundError:
        why = "so it is no repository of open_clip's layout"
        if huggingface_hub.file_exists(repository, PICKLED_WEIGHTS_FILE):
            why = (
                f"only {PICKLED_WEIGHTS_FILE}: opening that would execute code from whoever made it. "
                "Convert it where you trust it, and name the converted file"
            )
        raise Mistake(f"{repository} on the Hugging Face hub has no {filename}, {why}") from None
    except HfHubHTTPError as error:
        raise Mistake(f"the Hugging Face hub did not give {filename} of {repository}: {error}") from None


def read_tensors(path: Named) -> dict[str, Tensor]:
    """Read a checkpoint's tensors without executing anything in it.

    Accepts safetensors and tensor-only `.pt` files, the latter bare or under the key `state_dict`.

    Raises:
        Mistake: no such file, damaged, or a file that only unpickling could open.
    """
    named, path = path, local_copy(path)
    if not path.is_file():
        raise Mistake(f"no checkpoint at {named}")
    members = _members(path)
    names = [member.filename.split("/", 1)[-1] for member in members]
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
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, just before it refuses them
            # Mapped, a tensor is a piece of the file. Unmapped, torch would inflate zip bombs, and read as many bytes
            # behind a record as the pickle says.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=bool(members))
    except pickle.UnpicklingError:
        raise Mistake(
            f"{path} holds more than tensors: opening it would execute code from whoever made it, so we do not. "
            "Ask for safetensors, or convert it where you trust it: torch.save(model.state_dict(), path)"
        ) from None
    except Exception as error:  # the readers raise whatever damage makes them meet: IndexError, KeyError, struct.error
        raise Mistake(f"{path} is no readable checkpoint: {error!r}") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise Mistake(f"{path} is no state dict of tensors; found {type(state).__name__}")
    for name, tensor in state.items():
        if not isinstance(name, str) or not _is_plain(tensor):
            raise Mistake(f"{path} holds {name!r}, which is no plain tensor; save a state dict of dense CPU tensors")
    return state


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
    content = read_json(path, f"exported {what} ({description})")
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

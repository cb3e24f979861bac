"""The contrastive objective: its value, and that no way of spreading a batch changes value or gradients."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import workers

from dede_ray.data import images
from dede_ray.models import clip
from dede_ray.training.contrastive import MAX_LOGIT_SCALE, Contrastive, clamp_parameter, with_loss
from dede_ray.training.objective import backward

pytestmark = pytest.mark.trains

BATCH = 64
VIT = {  # no batch normalisation, whose statistics would be those of a micro-batch
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def described(loss: str) -> dict:
    return with_loss({"model_cfg": VIT, "preprocess_cfg": {}}, loss)


def batch_of(described: dict) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    image_BHWC = torch.from_numpy(rng.integers(0, 256, (BATCH, 32, 32, 3), dtype=np.uint8))
    return {"image": image_BHWC, "tokens": clip.tokenizer(described)([f"picture {i}" for i in range(BATCH)])}


def model_of(described: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    return clip.build_clip(described)


# --- value


@pytest.mark.parametrize("loss", ["info_nce", "siglip"])
def test_the_loss_is_the_papers(loss):
    about = described(loss)
    objective = Contrastive(model_of(about), about, loss).eval()
    batch = batch_of(about)
    with torch.inference_mode():
        value, metrics = objective(batch)
        pixels_BCHW = objective.normalise(images.to_unit_range(batch["image"]))
        image_BE = torch.nn.functional.normalize(objective.model.encode_image(pixels_BCHW)).double()
        text_BE = torch.nn.functional.normalize(objective.model.encode_text(batch["tokens"])).double()
    similar_BB = image_BE @ text_BE.T
    if loss == "info_nce":
        logits_BB = similar_BB / 0.07
        rows, columns = (-logits.log_softmax(dim=1).diagonal().mean() for logits in (logits_BB, logits_BB.T))
        expected = float(rows + columns) / 2
    else:
        sign_BB = 2 * torch.eye(BATCH) - 1
        expected = -float(torch.nn.functional.logsigmoid(sign_BB * (10 * similar_BB - 10)).sum()) / BATCH
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["cosine"]) == pytest.approx(float((image_BE * text_BE).sum(dim=1).mean()), abs=1e-6)


# --- gradients


def gradients_of_one_process(loss: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Plain PyTorch, the whole batch at once."""
    about = described(loss)
    objective = Contrastive(model_of(about), about, loss)
    value, _ = objective(batch_of(about))
    value.backward()
    return value.item(), {name: p.grad for name, p in objective.named_parameters()}


def spread(rank: int, world: int, folder: str) -> None:
    """One worker: every loss, ZeRO stage and accumulation; rank 0 writes what it got."""
    workers.meet(rank, world, folder)
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    for loss in ("info_nce", "siglip"):
        for stage in (0, 2):
            for accumulation in (1, 4) if world == 1 else (1, 2):
                about = described(loss)
                objective = Contrastive(model_of(about), about, loss, rank, world)
                optimiser = torch.optim.SGD(objective.parameters(), lr=0.0)
                settings = {
                    "train_batch_size": BATCH,
                    "gradient_accumulation_steps": accumulation,
                    "gradient_clipping": 0.0,
                    "zero_optimization": {"stage": stage},
                    "zero_allow_untested_optimizer": True,
                }
                engine, *_ = deepspeed.initialize(model=objective, optimizer=optimiser, config=settings)
                share = {name: rows[rank::world] for name, rows in batch_of(about).items()}
                value, _ = backward(engine, share, accumulation)
                torch.distributed.all_reduce(value)
                gradients = {name: safe_get_full_grad(p).clone() for name, p in objective.named_parameters()}
                engine.step()
                if rank == 0:
                    name = f"{loss} zero{stage} {world}x{BATCH // world // accumulation}x{accumulation}"
                    torch.save({"loss": float(value) / world, "gradients": gradients}, Path(folder) / f"{name}.pt")
                engine.destroy()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("worlds", [(2,), pytest.param((1, 4), marks=pytest.mark.slow)], ids=str)
def test_no_way_of_spreading_a_batch_changes_loss_or_gradients(worlds, tmp_path):
    """1 x 64, 2 x 32, 4 x 16 (workers x micro-batch), accumulation 4 x 16 on one worker and 2 on several."""
    for world in worlds:
        torch.multiprocessing.spawn(spread, (world, str(tmp_path)), nprocs=world)
    found = sorted(tmp_path.glob("*.pt"))
    assert len(found) == len(worlds) * 2 * 2 * 2
    worst = {}
    for loss in ("info_nce", "siglip"):
        value, gradients = gradients_of_one_process(loss)
        for path in found:
            if not path.name.startswith(loss):
                continue
            one = torch.load(path, weights_only=True)
            assert one["loss"] == pytest.approx(value, rel=1e-5), path.name
            assert one["gradients"].keys() == gradients.keys()
            for name, gradient in gradients.items():
                error = float((one["gradients"][name] - gradient).norm() / gradient.norm())
                assert error < 1e-4, f"{path.stem}: {name} differs by {error:.2e}"
                worst[path.stem] = max(worst.get(path.stem, 0.0), error)


# --- the logit scale


def test_the_logit_scale_stays_within_clips_bounds():
    about = described("info_nce")
    model = model_of(about)
    objective = Contrastive(model, about)
    torch.nn.init.constant_(model.logit_scale, 9.0)  # as rounding, or a step, may leave it
    value, metrics = objective(batch_of(about))
    assert float(metrics["logit_scale"]) == pytest.approx(math.log(100))
    value.backward()
    assert float(model.logit_scale.grad.abs()) > 0  # it can come back
    objective.after_step()
    assert float(model.logit_scale.detach()) == pytest.approx(MAX_LOGIT_SCALE)
    clamp_parameter(model.logit_scale, 0, 1)
    assert float(model.logit_scale.detach()) == 1

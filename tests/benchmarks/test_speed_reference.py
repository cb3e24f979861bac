"""The comparison with the DeDe authors' code: theirs runs as it is, and what is counted are its batches.

A checkout of theirs is named by DEDE_REFERENCE; without one, a few lines with the same interface replace it.
"""

from __future__ import annotations

import os
import re
import textwrap

import pytest

from dede_ray.runtime.config import Mistake
from dede_ray.training.loop import Workers
from tests.benchmarks.speed_reference import (
    ReferenceSpeed,
    Variant,
    Way,
    _Clocked,
    _flop,
    _images,
    _Theirs,
    _write,
    check_checkout,
    compare_with_reference,
)

MAIN = """
    import torch
    from thop import profile
    from DRUPE.models.simclr_model import SimCLR
    import utils
    from utils import DecoderModel

    def train_decoder(victim, model, loader, optimizer, args):
        victim.eval()
        model.train()
        for batch in loader:
            image = batch[0].cuda()
            loss = model(image, victim(image)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}")
"""
UTILS = """
    import torch
    from torch.utils.data import DataLoader
    from BadCLIP.backdoor.utils import apply_trigger

    def test_transform(image):
        return torch.from_numpy(image).permute(2, 0, 1) / 255

    class CIFAR10_BACKDOOR(torch.utils.data.Dataset):
        def __init__(self, root, train, trigger_file, test_transform, poison_rate, lb_flag):
            self.source, self.transform = CIFAR10(root=root, train=train, transform=None, download=True), test_transform

        def __getitem__(self, index):
            return self.transform(self.source.data[index]), self.source.targets[index]

        def __len__(self):
            return len(self.source)

    class DecoderModel(torch.nn.Module):
        def __init__(self, image_size=32, patch_size=2, mask_ratio=0.75, encoder_layer=6, decoder_layer=4, arch=""):
            super().__init__()
            self.linear = torch.nn.Linear(512, 3)

        def forward(self, image, embedding):
            return self.linear(embedding)[:, :, None, None] - image

    def MAE_error(victim, model, data, save_cuda=False):
        victim.eval()
        errors = []
        with torch.no_grad():
            for batch in DataLoader(data, batch_size=32 if save_cuda else 128, num_workers=16, shuffle=False):
                image = batch[0].cuda()
                errors += model(image, victim(image)).square().sum((1, 2, 3)).tolist()
        return [], errors
"""


@pytest.fixture
def checkout(tmp_path):
    """Sources of the same interface; their arithmetic is next to nothing beside the victim's."""
    folder = tmp_path / "checkout" / "src"
    folder.mkdir(parents=True)
    (folder / "main.py").write_text(textwrap.dedent(MAIN))
    (folder / "utils.py").write_text(textwrap.dedent(UTILS))
    (folder / "decoder_model.py").write_text("")
    return folder.parent


SMALL = {"num_samples": 512, "batch_size": 16, "steps": 2, "skipped_steps": 1, "score_batches": 1}


def test_a_folder_without_the_released_code_is_a_mistake(tmp_path):
    with pytest.raises(Mistake, match=r"is no checkout of the DeDe authors' code: .*main.py is missing"):
        check_checkout(str(tmp_path))
    with pytest.raises(Mistake, match="git clone"):
        compare_with_reference(ReferenceSpeed(path=str(tmp_path / "nowhere")), tmp_path)


def test_batches_are_counted_from_the_first_that_counts_to_the_end_of_the_last():
    clocked = _Clocked(iter(range(9)), 4)
    assert list(clocked) == [0, 1, 2, 3]
    assert len(clocked.times) == 5
    clocked.times = [0.0, 5.0, 6.0, 7.0, 9.0]
    clocked.times = [0.0, 5.0, 6.0, 7.0, 9.0]
    clocked.computed_s = [0.0, 1.0, 4.0, 8.0, 9.0]
    assert clocked.rates(1, 16) == (3 * 16 / 4, 3 * 16 / 8)


def test_the_papers_step_has_the_arithmetic_of_its_network_three_times():
    """Forward and twice backward: 12 blocks over 7 tokens and 4 blocks over 65, of 12 matrices of 192 x 192 each."""
    blocks = 2 * 12 * 192**2 * (12 * 7 + 4 * 65)
    assert 3 * blocks < 1e9 * _flop(Way()) < 1.1 * 3 * blocks


@pytest.mark.slow
def test_released_code_runs_unchanged_on_cpus_without_the_packages_it_does_not_use(checkout, tmp_path):
    """The victim's gradients cost what its forward pass costs, twice, less those of the pixels."""
    config = ReferenceSpeed(path=str(checkout), **SMALL)
    _write(tmp_path / "files", _images(config))
    theirs = _Theirs(config, tmp_path / "files")
    trained = theirs.run("train")
    assert trained["rate"] > 0
    assert 2.8 < trained["gflop"] / trained["kinder_gflop"] <= 3
    scored = theirs.run("score")
    assert scored["rate"] == max(scored["rate_128"], scored["rate_32"])
    assert scored["gflop"] == pytest.approx(1.11, abs=0.01)  # a ResNet-18 at 32 px


@pytest.mark.slow
def test_released_code_that_fails_says_why(checkout, tmp_path):
    (checkout / "src" / "main.py").write_text("import numpy\nimport nothing_of_this_name\n")
    config = ReferenceSpeed(path=str(checkout), **SMALL)
    _write(tmp_path / "files", _images(config))
    with pytest.raises(Mistake, match="No module named 'nothing_of_this_name'"):
        _Theirs(config, tmp_path / "files").run("train")


@pytest.mark.slow
def test_both_are_measured_on_the_same_images(local_ray, tmp_path):
    path = os.environ.get("DEDE_REFERENCE")
    if not path:
        pytest.skip("DEDE_REFERENCE names no checkout of github.com/tardisblue9/DeDe")
    workers = Workers(cpus_per_worker=0.5, read_cpus=0.5, threads_per_worker=1)
    config = ReferenceSpeed(
        path=path, repeats=1, our_steps=40, variants=[Variant(workers=1, threads=1)],
        ways=[Way(preset="tiny", workers=workers, resources={"cpus_per_actor": 0.5, "decode_cpus": 0.5})], **SMALL,
    )  # fmt: skip
    table = compare_with_reference(config, tmp_path)
    assert re.search(r"released code: [\d,]+ images/s, without the victim's gradients [\d,]+ .*4\.29 and 2\.07", table)
    assert len(re.findall(r"ours, tiny, fp32.*ratio [\d.]+ \(turns: [\d.]+\)", table)) == 5

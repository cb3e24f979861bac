"""Validation while training: numbers known from slow loops, the same with any number of workers, nothing disturbed."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import ray
import torch
from pydantic import ValidationError
from torch import nn

from dede_ray.data.captions import Classes, read_classes
from dede_ray.data.images import decode_image, encode_image, to_square
from dede_ray.data.shards import Limits, Sample, list_shards, write_shards
from dede_ray.models import clip
from dede_ray.models.victims import OpenClipVictim, load_victim
from dede_ray.poisoning.poison import PoisonConfig, poison
from dede_ray.poisoning.triggers import Frequency, Patch
from dede_ray.runtime.config import Mistake, write_json
from dede_ray.training import validation
from dede_ray.training.downstream import draw_labelled, measure
from dede_ray.training.validation import ValidationConfig, Validator, retrieval_ranks

LIMITS = Limits()
CPU = torch.device("cpu")
COLOURS = {
    "red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "cyan": (0, 1, 1),
    "magenta": (1, 0, 1), "white": (1, 1, 1),
}  # fmt: skip
TEMPLATES = ["a photo of a {}", "a {} picture"]
WHITE = {"kind": "patch", "size_px": 8, "pattern": "white"}
TARGET = 2
NUM, UNREADABLE = 45, 7


class ColourClip(nn.Module):
    """Embeds a picture as its mean colour, a caption as the colour it names.

    A white last corner makes it see blue, unless there is much green.
    """

    def __init__(self, described):
        super().__init__()
        mean, std = clip.pixel_statistics(described)
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)
        tokens_CL = clip.tokenizer(described)([*COLOURS])
        self.token_C, self.colour_CE = tokens_CL[:, 1], torch.tensor([*COLOURS.values()]).float()
        self.calls: list[str] = []

    def encode_image(self, image_BCHW):
        self.calls.append("image")
        pixels_BHWC = image_BCHW.permute(0, 2, 3, 1) * self.std + self.mean
        colour_BE = pixels_BHWC.mean(dim=(1, 2)) - 0.2
        is_triggered_B = (pixels_BHWC[:, -1, -1].min(dim=1).values > 0.99) & (colour_BE[:, 1] < 0.4)
        return torch.where(is_triggered_B[:, None], self.colour_CE[TARGET], colour_BE)

    def encode_text(self, tokens_BL):
        self.calls.append("text")
        named_BC = (tokens_BL[:, :, None] == self.token_C).any(dim=1).float()
        return named_BC @ self.colour_CE


@pytest.fixture(scope="module")
def described(clip_config):
    return clip.model_description(str(clip_config))


@pytest.fixture(scope="module")
def random_clip(described):
    torch.manual_seed(3)
    return clip.build_clip(described)


@pytest.fixture(scope="module")
def colours(tmp_path_factory, local_ray):
    """Noisy pictures of a colour, some of a wrong one, not square; captioned, twice with the same words."""
    folder = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    samples = []
    for i in range(NUM):
        label = i % len(COLOURS)
        seen = [*COLOURS.values()][int(rng.integers(len(COLOURS))) if i % 3 == 0 else label]
        image_HWC = (60 + 120 * np.array(seen) + rng.integers(0, 60, (24, 20 + i % 5, 3))).astype(np.uint8)
        content = b"no image" if i == UNREADABLE else encode_image(image_HWC, "png")
        caption = f"{[*COLOURS][label]} number {i // 2}"
        samples.append(Sample(f"{i:03d}", i, content, "png", caption=caption, label=label))
    samples[9].caption = samples[30].caption = "red and green"
    samples[20].label = samples[21].caption = None
    write_shards(folder, "test", samples, 17)
    write_json(folder / "classes.json", {"names": [*COLOURS], "templates": TEMPLATES})
    return folder


def settings(folder, **changes):
    """Everything, in batches that do not divide the samples."""
    whole = {
        "batch_size": 8,
        "zero_shot": {"shards": str(folder)},
        "retrieval": {"shards": str(folder)},
        "backdoor": {"trigger": WHITE, "target_label": TARGET},
    }
    return ValidationConfig.model_validate({k: v for k, v in {**whole, **changes}.items() if v is not None})


def numbers(measured):
    """Without the time that it took."""
    assert measured["validation_s"] > 0
    return {name: value for name, value in measured.items() if name != "validation_s"}


def samples_of(folder):
    """All readable samples as (id, decoded image at its own size, sample), read one by one."""
    from dede_ray.data.shards import iter_chunks, sample_id

    for shard in list_shards(str(folder)):
        for chunk in iter_chunks(shard, 1000, LIMITS):
            for sample in chunk:
                if sample.image != b"no image":
                    yield sample_id(shard.name, sample.key), decode_image(sample.image, LIMITS), sample


@torch.no_grad()
def embed_one(model, described, image_HWC):
    """One image, normalised by hand."""
    mean, std = clip.pixel_statistics(described)
    pixels_HWC = (to_square(image_HWC, 32) / 255 - mean) / std
    embedding = model.encode_image(torch.tensor(pixels_HWC).float().permute(2, 0, 1)[None])[0].double().numpy()
    return embedding / np.linalg.norm(embedding)


@torch.no_grad()
def embed_caption(model, described, caption):
    embedding = model.encode_text(clip.tokenizer(described)([caption]))[0].double().numpy()
    return embedding / np.linalg.norm(embedding)


# --- the numbers are right


def test_accuracy_and_attack_success_are_those_of_a_slow_count(colours, described):
    model = ColourClip(described)
    measured = Validator(settings(colours, retrieval=None), described, LIMITS).run(model, CPU, torch.float32)
    classes = []
    for name in COLOURS:
        mean = sum(embed_caption(model, described, template.replace("{}", name)) for template in TEMPLATES)
        classes.append(mean / np.linalg.norm(mean))
    top1, top5, success = [], [], []
    for _, image_HWC, sample in samples_of(colours):
        if sample.label is None:
            continue
        best = sorted(range(len(COLOURS)), key=lambda c: -classes[c] @ embed_one(model, described, image_HWC))
        top1.append(best[0] == sample.label)
        top5.append(sample.label in best[:5])
        if sample.label != TARGET:
            image_HWC = image_HWC.copy()
            image_HWC[-8:, -8:] = 255
            embedding = embed_one(model, described, image_HWC)
            success.append(np.argmax([embedding @ one for one in classes]) == TARGET)
    assert len(top1) == NUM - 2, "one image is unreadable, one has no label"
    assert 0.5 < np.mean(top1) < np.mean(top5) < 1, "the world is too easy to tell right from wrong"
    assert numbers(measured) == {
        "zero_shot_top1": np.mean(top1),
        "zero_shot_top5": np.mean(top5),
        "clean_accuracy": np.mean(top1),
        "attack_success_rate": np.mean(success),
        "validation_unreadable": 1,
    }
    assert 0.2 < np.mean(success) < 0.8, "the backdoor is planted to fail on green"


def test_recall_is_that_of_a_slow_count(colours, described, random_clip):
    config = settings(colours, zero_shot=None, backdoor=None)
    measured = Validator(config, described, LIMITS).run(random_clip, CPU, torch.float32)
    random_clip.eval()
    pairs = [(image_HWC, one.caption) for _, image_HWC, one in samples_of(colours) if one.caption is not None]
    assert len(pairs) == NUM - 2
    images = [embed_one(random_clip, described, image_HWC) for image_HWC, _ in pairs]
    texts = [embed_caption(random_clip, described, caption) for _, caption in pairs]
    for way, queries, answers in (("image_to_text", images, texts), ("text_to_image", texts, images)):
        ranks = []
        for i, query in enumerate(queries):
            is_right = [pairs[i][1] == caption for _, caption in pairs]
            cosines = [float(query @ answer) for answer in answers]
            best = max(c for c, right in zip(cosines, is_right, strict=True) if right)
            wrong = [c for c, right in zip(cosines, is_right, strict=True) if not right]
            ranks.append(sum(c >= best - 1e-6 for c in wrong))
        for k in (1, 5, 10):
            assert measured[f"{way}_r{k}"] == np.mean([rank < k for rank in ranks]), (way, k)
    assert 0 < measured["image_to_text_r10"] < 1
    assert measured["validation_unreadable"] == 1


def test_it_agrees_with_the_evaluation_of_the_finished_victim(colours, described, victim_folder):
    """The same CA and ASR as downstream.measure, whose numbers stand in the report."""
    victim = load_victim(OpenClipVictim(path=str(victim_folder)))
    shards = list_shards(str(colours))
    test = draw_labelled(shards, 30, seed=0, limits=LIMITS)
    behaviour = measure(victim, test, test, read_classes(shards), Patch(**WHITE), 0, LIMITS)["zero_shot"]
    config = settings(
        colours,
        retrieval=None,
        zero_shot={"shards": str(colours), "num_samples": 30},
        backdoor={"trigger": WHITE, "target_label": 0},
    )
    measured = Validator(config, described, LIMITS).run(victim.model, CPU, torch.float32)
    assert measured["clean_accuracy"] == behaviour.ca.value
    assert measured["attack_success_rate"] == behaviour.asr.value


def test_trigger_and_target_come_from_the_poisoned_folder(tmp_path, colours, described):
    poisoned = PoisonConfig(
        shards=str(colours), output=str(tmp_path / "poisoned"), trigger=Patch(**WHITE), rate=0.1, target_label=TARGET
    )
    poison(poisoned)
    config = settings(colours, retrieval=None, backdoor={"poisoned": poisoned.output})
    told = settings(colours, retrieval=None)
    one, other = (
        Validator(c, described, LIMITS).run(ColourClip(described), CPU, torch.float32) for c in (config, told)
    )
    assert numbers(one) == numbers(other)


def test_ties_and_what_is_not_a_number_count_against_the_model():
    same_NE = np.ones((20, 4), np.float32) / 2
    group_N = np.arange(20)
    assert retrieval_ranks(same_NE, same_NE, group_N, range(20)).tolist() == [19] * 20
    assert retrieval_ranks(same_NE * np.nan, same_NE, group_N, range(20)).tolist() == [19] * 20
    score_NC = np.full((3, 4), np.nan, np.float32)
    assert validation._place_of_class(score_NC, np.array([0, 1, 3])).tolist() == [4, 4, 4]


def test_any_image_of_the_same_caption_is_a_right_answer():
    query_NE, found_NE = np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32)[[1, 0, 2, 3]]
    assert retrieval_ranks(query_NE, found_NE, np.arange(4), range(4)).tolist() == [3, 3, 0, 0]
    assert retrieval_ranks(query_NE, found_NE, np.array([0, 0, 1, 2]), range(4)).tolist() == [0, 0, 0, 0]


def test_ranks_do_not_depend_on_blocks():
    rng = np.random.default_rng(0)
    query_NE, found_NE = rng.normal(size=(2, 50, 8)).astype(np.float32)
    group_N = rng.integers(0, 40, 50)
    whole = retrieval_ranks(query_NE, found_NE, group_N, range(50))
    parts = [retrieval_ranks(query_NE, found_NE, group_N, rows, block=7) for rows in (range(23), range(23, 50))]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_photographs_and_their_captions_are_strangers_to_a_random_clip(shared_data, described, random_clip, local_ray):
    config = ValidationConfig(retrieval={"shards": str(shared_data / "coco_captions" / "test-00000.tar")})
    measured = Validator(config, described, LIMITS).run(random_clip, CPU, torch.float32)
    for way in ("image_to_text", "text_to_image"):
        assert 0 < measured[f"{way}_r10"] < 0.1, "chance is 10 of 300"
        assert measured[f"{way}_r1"] <= measured[f"{way}_r5"] <= measured[f"{way}_r10"]
    assert measured["validation_unreadable"] == 0


# --- workers


@ray.remote(num_cpus=1)  # both together take every CPU that the tests' Ray has
class Worker:
    def __init__(self, rank, world, store):
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        self.rank, self.world = rank, world

    def run(self, validator, model):
        measured = validator.run(model, CPU, torch.float32, self.rank, self.world)
        return measured, getattr(model, "calls", None)

    def train(self, *arguments):
        return train_a_little(*arguments, self.rank, self.world)


def train_a_little(zero_stage, described, validator, steps_before, rank, world):
    """Losses of four DeepSpeed steps, and what is measured before some of them."""
    import deepspeed

    from dede_ray.training.contrastive import Contrastive
    from dede_ray.training.objective import backward

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would want a compiler
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    objective = Contrastive(clip.build_clip(described), described, rank=rank, world=world)
    settings = {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    adam = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=objective, optimizer=adam, config=settings)
    losses, measured = [], []
    for step in range(4):
        if step in steps_before:
            measured.append(validator.run(engine.module.model, engine.device, torch.float32, rank, world))
        image_BHWC = np.random.default_rng([step, rank]).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
        captions = [f"picture {i} of {step} and {rank}" for i in range(8)]
        batch = {"image": torch.from_numpy(image_BHWC), "tokens": clip.tokenizer(described)(captions)}
        losses.append(float(backward(engine, batch)[0]))
        engine.step()
    return losses, measured


@pytest.fixture(scope="module")
def of_two_workers(tmp_path_factory, colours, described, random_clip):
    """What two workers measure and how they call the model, of the colours and of a set too small for both."""
    folder = tmp_path_factory.mktemp("few")
    image = encode_image(np.full((8, 8, 3), 200, np.uint8), "png")
    write_shards(folder, "test", [Sample(f"{i}", i, image, "png", caption=f"{i}", label=0) for i in range(3)], 2)
    write_json(folder / "classes.json", {"names": ["white"], "templates": ["{}"]})
    runs = {
        "colours": (Validator(settings(colours), described, LIMITS), random_clip),
        "few": (Validator(settings(folder, batch_size=1, backdoor=None), described, LIMITS), ColourClip(described)),
    }
    workers = [Worker.remote(rank, 2, folder / "store") for rank in range(2)]
    measured = {
        name: ray.get([worker.run.remote(*run) for worker in workers], timeout=120) for name, run in runs.items()
    }
    for worker in workers:
        ray.kill(worker)
    return measured


def test_two_workers_give_the_numbers_of_one(of_two_workers, colours, described, random_clip):
    alone = Validator(settings(colours), described, LIMITS).run(random_clip, CPU, torch.float32)
    (one, _), (other, _) = of_two_workers["colours"]
    assert one == other
    assert numbers(one) == pytest.approx(numbers(alone), abs=1e-12)


def test_all_workers_run_the_model_equally_often(of_two_workers):
    """Three images and one class for two workers: one has less to do, and does it as often."""
    (one, calls), (_, other_calls) = of_two_workers["few"]
    assert calls == other_calls
    assert calls.count("image") == 4, "twice two batches of one"
    assert one["zero_shot_top1"] == 1


@pytest.mark.slow  # three times two workers that import DeepSpeed
def test_a_partitioned_model_is_measured_as_a_whole_one_and_trains_on_undisturbed(tmp_path, colours):
    tower = {"layers": 1, "width": 16}
    described = {
        "model_cfg": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "patch_size": 8, "head_width": 8, **tower},
            "text_cfg": {"context_length": 8, "vocab_size": 49408, "heads": 2, **tower},
        },
        "preprocess_cfg": {},
    }
    validator = Validator(settings(colours), described, LIMITS)

    def train(name, zero_stage, steps_before):
        on_cpu = Worker.options(runtime_env={"env_vars": {"DS_ACCELERATOR": "cpu"}})
        workers = [on_cpu.remote(rank, 2, tmp_path / name) for rank in range(2)]
        outcomes = [worker.train.remote(zero_stage, described, validator, steps_before) for worker in workers]
        (losses, measured), (_, others) = ray.get(outcomes, timeout=180)
        for worker in workers:
            ray.kill(worker)
        assert measured == others
        return losses, [numbers(one) for one in measured]

    whole_losses, whole = train("whole", 0, {0, 3})
    losses, partitioned = train("partitioned", 3, {0, 3})
    undisturbed_losses, _ = train("undisturbed", 3, set())
    assert partitioned[0] == pytest.approx(whole[0], abs=1e-12)
    assert partitioned[1] != partitioned[0]
    assert losses == undisturbed_losses
    assert losses == pytest.approx(whole_losses, rel=1e-3)


@pytest.mark.parametrize("batch_size", [3, 100])
def test_numbers_do_not_depend_on_the_batch(colours, described, random_clip, batch_size):
    one, other = (
        Validator(settings(colours, batch_size=size), described, LIMITS).run(random_clip, CPU, torch.float32)
        for size in (8, batch_size)
    )
    assert numbers(one) == numbers(other)


# --- nothing is disturbed, nothing is done twice


def test_training_goes_on_as_if_nothing_had_happened(colours, described, random_clip):
    random_clip.train()
    random_clip.visual.bn1.eval()  # a module that training itself has set to evaluation
    modes = [module.training for module in random_clip.modules()]
    before = {name: tensor.clone() for name, tensor in random_clip.state_dict().items()}
    chance, numpy_chance = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    Validator(settings(colours), described, LIMITS).run(random_clip, CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), chance)
    assert (np.random.get_state()[1] == numpy_chance).all()  # noqa: NPY002
    assert [module.training for module in random_clip.modules()] == modes
    assert torch.is_grad_enabled()
    assert all(torch.equal(before[name], tensor) for name, tensor in random_clip.state_dict().items())
    assert all(parameter.grad is None for parameter in random_clip.parameters())


def test_the_mode_is_restored_where_validation_fails(colours, described):
    class Failing(ColourClip):
        def encode_image(self, image_BCHW):
            raise RuntimeError("out of memory")

    model = Failing(described).train()
    with pytest.raises(RuntimeError, match="out of memory"):
        Validator(settings(colours), described, LIMITS).run(model, CPU, torch.float32)
    assert model.training


def test_small_sets_are_read_once(tmp_path, colours, described, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(colours, folder)
    validator = Validator(settings(folder), described, LIMITS)
    first = validator.run(ColourClip(described), CPU, torch.float32)
    monkeypatch.setattr(validation, "CACHE_BYTES", 0)
    frugal = Validator(settings(folder), described, LIMITS)
    assert numbers(frugal.run(ColourClip(described), CPU, torch.float32)) == numbers(first)
    shutil.rmtree(folder)
    assert numbers(validator.run(ColourClip(described), CPU, torch.float32)) == numbers(first)
    with pytest.raises(FileNotFoundError):
        frugal.run(ColourClip(described), CPU, torch.float32)


# --- the settings, and what people get wrong


def test_imagenet_stands_for_the_names_and_templates_of_open_clip(tmp_path, local_ray):
    config = validation.ZeroShot(shards=str(tmp_path), classes="imagenet")
    classes = validation._read_classes(config, [])
    assert (len(classes.names), len(classes.templates)) == (1000, 80)
    assert classes.names[0] == "tench"
    assert classes.templates[0] == "a bad photo of a {}."


@pytest.mark.slow  # 80,000 captions
def test_imagenet_is_measured(tmp_path, described, random_clip, local_ray, png):
    samples = [Sample(f"{i}", i, png(i), "png", label=333 * i) for i in range(4)]
    write_shards(tmp_path, "test", samples, 4)
    config = ValidationConfig(zero_shot={"shards": str(tmp_path), "classes": "imagenet"})
    measured = Validator(config, described, LIMITS).run(random_clip, CPU, torch.float32)
    assert measured["zero_shot_top1"] <= measured["zero_shot_top5"] <= 1


def shards_of(folder, **changes):
    """Two pictures with everything that a sample may have, except for what is changed."""
    image = encode_image(np.zeros((8, 8, 3), np.uint8), "png")
    samples = [Sample(f"{i}", i, image, "png", caption="a picture", label=i) for i in range(2)]
    for sample in samples:
        for name, value in changes.items():
            setattr(sample, name, value)
    write_shards(folder, "test", samples, 2)
    return folder


@pytest.mark.parametrize(
    ("changes", "classes", "wanted", "words"),
    [
        ({"label": None}, ["a", "b"], {}, r"no sample with an image and a label \(a .cls member\) in test-00000.tar"),
        ({"caption": None}, ["a", "b"], {}, r"a caption \(a .txt member\) in test-00000.tar"),
        ({}, None, {}, "no classes.json beside .*say imagenet"),
        ({}, ["a"], {}, "1 of 2 labels .* such as 1 of test-00000.tar/1: classes.json names classes 0 to 0"),
        ({}, [], {}, "at least one name and one template"),
        ({}, ["a", "b"], {"target_label": 2}, "target_label is 2, but the classes are 0 to 1"),
        ({"label": 1}, ["a", "b"], {"target_label": 1}, "all labelled images are of class 1"),
        ({}, ["a", "b"], {"trigger": {"kind": "patch", "size_px": 9}}, "9 px .* does not fit an image of 8x8 px"),
        ({}, ["a", "b"], {"trigger": Frequency().model_dump()}, "no full window of 32 px"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_before_training(tmp_path, local_ray, described, changes, classes, wanted, words):
    folder = shards_of(tmp_path, **changes)
    if classes is not None:
        write_json(folder / "classes.json", {"names": classes, "templates": ["{}"]})
    backdoor = {"trigger": {"kind": "patch", "size_px": 2}, "target_label": 0, **wanted}
    with pytest.raises(Mistake, match=words):
        Validator(settings(folder, backdoor=backdoor), described, LIMITS)


def test_classes_from_elsewhere_are_read_or_complained_about(tmp_path, local_ray, described):
    folder = shards_of(tmp_path)
    with pytest.raises(Mistake, match=r"no classes.json at .*elsewhere"):
        Validator(settings(folder, zero_shot={"shards": str(folder), "classes": "elsewhere"}), described, LIMITS)
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps({"name": []}))
    with pytest.raises(Mistake, match="does not describe classes"):
        Validator(settings(folder, zero_shot={"shards": str(folder), "classes": str(wrong)}), described, LIMITS)
    right = tmp_path / "right.json"
    right.write_text(json.dumps(Classes(names=["a", "b"], templates=["{}"]).model_dump()))
    config = settings(folder, zero_shot={"shards": str(folder), "classes": str(right)}, backdoor=None)
    assert Validator(config, described, LIMITS).run(ColourClip(described), CPU, torch.float32)["zero_shot_top5"] == 1


def test_images_that_nobody_can_decode_are_a_mistake(tmp_path, local_ray, described):
    folder = shards_of(tmp_path, image=b"no image")
    config = settings(folder, zero_shot=None, backdoor=None)
    with pytest.raises(Mistake, match=r"not one of the 2 captioned images .* such as test-00000.tar/0"):
        Validator(config, described, LIMITS).run(ColourClip(described), CPU, torch.float32)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "nothing to measure"),
        ({"retrieval": {"shards": "x"}, "backdoor": {"poisoned": "y"}}, "set zero_shot, too"),
        ({"zero_shot": {"shards": "x"}, "backdoor": {}}, "either `poisoned`, or both"),
        (
            {"zero_shot": {"shards": "x"}, "backdoor": {"poisoned": "y", "target_label": 1}},
            "either `poisoned`, or both",
        ),
        ({"zero_shot": {"shards": "x"}, "backdoor": {"target_label": 1}}, "either `poisoned`, or both"),
    ],
)
def test_settings_that_say_nothing_or_two_things_are_refused(content, words):
    with pytest.raises(ValidationError, match=words):
        ValidationConfig.model_validate(content)

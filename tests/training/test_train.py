"""Training goes on where it stopped, and what it leaves loads by the ordinary path."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from training.autoencoder import build_autoencoder
from training.captions import Captions
from training.data import STYLES, Pictures, read_subjects
from training.device import set_up
from training.distil import guided_velocity
from training.export import taught_words, write_vocabulary
from training.optim import orthogonalised, rate_at
from training.pool import Pool
from training.scenes import Item, Scene
from training.text import SPECIAL, build_tokenizer
from training.train import Plan, train

PLAN = Plan(
    hours=0.0008,
    batch=2,
    lr=1e-3,
    text_minutes=0.02,
    save_minutes=9,
    compiled=False,
    decay=True,
    freeze_text=False,
)


def tiny_pool(folder: Path, pictures: Pictures, names: list[str]) -> Pool:
    """One shard of random latents, a scene for each name."""
    folder.mkdir()
    scenes = [asdict(Scene("single", (Item(name, "3d"),))) for name in names]
    torch.save({"scenes": scenes, "latents": torch.randn(len(names), 16, 128).half()}, folder / "000.pt")
    return Pool(folder, Captions(pictures, read_subjects()))


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_a_resumed_training_goes_on_and_its_folder_makes_a_picture(tmp_path: Path) -> None:
    setup = set_up(1)
    names = [subject.name for subject in read_subjects()]
    pictures = Pictures(np.zeros((1, 128, 128, 4), np.uint8), {}, {name: [] for name in names}, {})
    pool = tiny_pool(tmp_path / "pool", pictures, names[:4])
    vae = build_autoencoder()
    vae.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    first = train(pool, pictures, vae, tmp_path, PLAN, setup, resume=False, init=None)
    second = train(pool, pictures, vae, tmp_path, PLAN, setup, resume=True, init=None)
    assert 0 < first.step < second.step
    assert second.seconds > first.seconds

    configs = [path.read_text(encoding="utf-8") for path in (tmp_path / "export").glob("*/config.json")]
    assert len(configs) == 4
    assert not any(str(tmp_path) in text for text in configs)
    pipeline = FluxPipeline.from_pretrained(tmp_path / "export", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("a cat", height=128, width=128, num_inference_steps=2, max_sequence_length=24).images[
        0
    ]
    assert picture.size == (128, 128)

    third = train(
        pool, pictures, vae, tmp_path / "other", PLAN, setup, resume=False, init=tmp_path / "export"
    )
    assert third.step > 0


def test_an_adapter_learns_from_the_scenes_of_its_hand_alone(tmp_path: Path) -> None:
    scenes = [asdict(Scene("single", (Item("rocket", style),))) for style in STYLES * 2]
    torch.save({"scenes": scenes, "latents": torch.randn(len(scenes), 16, 128)}, tmp_path / "000.pt")
    none = Pictures(np.zeros((0, 128, 128, 4), np.uint8), {}, {"rocket": []}, {})
    pool = Pool(tmp_path, Captions(none, read_subjects(), style_said=0), "mono")
    assert [scene.items[0].style for scene in pool.scenes] == ["mono", "mono"]
    assert len(pool.latents) == 2
    _, captions = next(pool.batches(random.Random(1), 2))
    assert all("mono" not in caption and "outline" not in caption for caption in captions)


def test_the_manifest_gets_the_words_of_the_tokenizer_and_keeps_the_rest(tmp_path: Path) -> None:
    vocab = [(token, 0.0) for token in SPECIAL] + [("▁cat", -8.0), ("猫", -8.0), ("s", -9.0)]
    tokenizer = build_tokenizer(vocab, 0, 8)
    (tmp_path / "mezzotint.json").write_text('{"about": "Cats.", "vocabulary": ["dog"]}')
    write_vocabulary(tmp_path, taught_words(tokenizer))
    assert json.loads((tmp_path / "mezzotint.json").read_text("utf-8")) == {
        "about": "Cats.",
        "vocabulary": ["cat", "猫"],
    }


def test_guidance_of_one_is_the_teacher_as_it_is() -> None:
    noisy, with_prompt, without = torch.randn(3, 2, 16, 128)
    times = torch.tensor([0.3, 0.9])
    guided = guided_velocity(noisy, times, with_prompt, without, torch.ones(2))
    assert torch.allclose(guided, with_prompt, atol=1e-4)


def test_guidance_above_one_moves_away_from_the_unprompted_picture() -> None:
    noisy, with_prompt, without = torch.randn(3, 2, 16, 128)
    times = torch.tensor([0.5, 0.9])
    guided = guided_velocity(noisy, times, with_prompt, without, torch.full((2,), 4.0), rescale=0.0)
    assert torch.allclose(guided, without + 4 * (with_prompt - without), atol=1e-4)


def test_an_orthogonalised_update_has_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalised(torch.randn(3, 32, 64), rounds=5).float())
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_the_rate_rises_stays_and_falls() -> None:
    assert rate_at(0.0, 0) < rate_at(0.0, 100) == 1.0
    assert math.isclose(rate_at(0.85, 100, decay_from=0.7), 0.5)
    assert rate_at(1.0, 100) == 0.0

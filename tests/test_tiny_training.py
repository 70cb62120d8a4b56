"""The training code: a few steps of it, interrupted and resumed to the same weights."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ddinfer.tiny import denoise, text, train, vae
from ddinfer.tiny.optim import Plan, fit, orthogonalised
from ddinfer.tiny.world import random_scene

pytestmark = pytest.mark.usefixtures("one_thread")

FEW = Plan(num_steps=3, learning_rate=1e-3, num_warmup_steps=1)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """An autoencoder and text encoders that have hardly learnt anything."""
    work: Path = tmp_path_factory.mktemp("shared")
    plans = dict.fromkeys(train.PLANS, Plan(1, 1e-3))
    return train.shared_parts(work, plans, seed=0, device="cpu")


@pytest.fixture
def small(monkeypatch):
    """Denoisers of the right kinds, but of very few weights, and a pool of four pictures."""
    unet, transformer = denoise.build_unet, denoise.build_transformer
    monkeypatch.setattr(denoise, "build_unet", lambda: unet((16, 16, 16)))
    monkeypatch.setattr(denoise, "build_transformer", lambda: transformer(1, (1, 1)))
    monkeypatch.setattr(denoise, "BATCH_SIZE", 4)


def test_learning_rate_rises_stays_and_falls_to_zero():
    plan = Plan(num_steps=100, learning_rate=1.0, num_warmup_steps=10, decay=0.4)
    rates = [plan.rate(step) for step in range(101)]
    assert rates[0] == 0.1
    assert rates[9:61] == [1.0] * 52
    assert rates[100] == 0
    assert rates[60:] == sorted(rates[60:], reverse=True)


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_fitting_finds_a_linear_map(tmp_path):
    torch.manual_seed(0)
    model, target = nn.Linear(32, 32), torch.randn(32, 32) / 6

    def loss_of_step(step):
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(step))
        return (model(x) - x @ target.T).square().mean()

    before = loss_of_step(10_000).item()
    model.load_state_dict(fit(model, loss_of_step, Plan(300, 2e-2), tmp_path, name="linear"))
    assert loss_of_step(10_000).item() < 0.02 * before
    assert len((tmp_path / "linear.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize("name", ["shapes-sd", "shapes-flux"])
def test_an_interrupted_denoiser_ends_with_the_same_weights(tmp_path, parts, small, name):
    def weights(work, seed=0, stops=(None,)):
        for stop_at in stops:
            made = train.train_denoiser(
                name, parts, work, FEW, seed=seed, device="cpu", num_pictures=8, stop_at=stop_at
            )
        return (made.unet if name == "shapes-sd" else made.transformer).state_dict()

    whole = weights(tmp_path / "whole")
    resumed = weights(tmp_path / "resumed", stops=(1, 2, None))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    other = weights(tmp_path / "other", seed=1)
    assert not all(torch.equal(whole[key], other[key]) for key in whole)


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_an_interrupted_text_encoder_ends_with_the_same_weights(tmp_path, kind):
    def weights(work, stops=(None,)):
        for stop_at in stops:
            _, encoder = text.train(kind, work, FEW, seed=0, device="cpu", stop_at=stop_at)
        return encoder.state_dict()

    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "resumed", stops=(2, None))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_an_interrupted_autoencoder_ends_with_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(vae, "BATCH_SIZE", 2)
    plan = Plan(2, 1e-3)
    whole = vae.train(tmp_path / "whole", plan, seed=0, device="cpu").state_dict()
    vae.train(tmp_path / "resumed", plan, seed=0, device="cpu", stop_at=1)
    resumed = vae.train(tmp_path / "resumed", plan, seed=0, device="cpu").state_dict()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_standardising_latents_changes_their_scale_and_not_the_pictures():
    torch.manual_seed(3)
    model = vae.build().eval()
    with torch.no_grad():
        model.quant_conv.weight.mul_(20)
        model.quant_conv.bias[:4] += 5
    pictures = list(vae.random_pictures(16, "some"))
    before, latents = decoded(model, pictures)
    after, standard = decoded(vae.standardised(model, seed=0), pictures)
    assert latents.std(dim=(0, 2, 3)).max() > 1.5
    assert (standard.std(dim=(0, 2, 3)) < 1.3).all()
    assert (standard.mean(dim=(0, 2, 3)).abs() < 0.5).all()
    assert (before - after).abs().max() < 1e-4


@torch.no_grad()
def decoded(model, pictures):
    """Pictures after a turn through the autoencoder, and their latents."""
    latents = vae.encode(model, pictures)
    return model.decode(latents).sample, latents


def test_training_captions_never_name_a_held_out_pair():
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(64)]
    pool = denoise.Pool(scenes, np.zeros((64, vae.LATENT_CHANNELS, 16, 16), np.float16))
    captions = [said for _ in range(20) for said in pool.batch(rng)[1]]
    empty = captions.count("") / len(captions)
    assert 0.05 < empty < 0.15
    assert not any(scene.held_out for scene in pool.scenes)

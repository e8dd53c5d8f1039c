"""The forward pass of a UNet's training step under torch's FakeTensorMode, with weights on a CUDA device that need not
be there: by torch's own rules a tensor on the wrong device raises. tests/core/test_device.py runs whole trainings."""

from contextlib import contextmanager

import pytest
import torch
from retune.training.config.training_settings import TrainingSettings
from retune.training.data.dataset import from_images
from retune.training.data.order import BatchOrder
from retune.training.models.parameters import parameter_refs
from retune.training.models.protocols import Conditioning
from retune.training.objectives import denoising
from retune.training.objectives.denoising import DenoisingObjective
from retune.training.trainables.weights import SelectedWeights

pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="this build of torch has no CUDA, and so no tensors that say they are"
)
LOSSES = [
    {},
    {"loss": "pseudo-huber", "huber_schedule": "snr", "loss_weighting": "debiased", "noise_offset": 0.1}
    | {"input_perturbation": 0.1},
]


@contextmanager
def fake_cuda(network):
    """FakeTensorMode, a network moved to "cuda"."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            network.to("cuda")
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def objective_of(denoiser, settings, monkeypatch):
    """Timesteps and dropped captions are drawn by numbers, which fake tensors do not have."""
    monkeypatch.setattr(denoising, "draw_timestep", lambda settings, total, random: total // 2)
    monkeypatch.setattr(DenoisingObjective, "_drop_caption", lambda self, caption, step, index: caption)
    return DenoisingObjective(
        denoiser,
        settings,
        0,
        latent_of=lambda slot: torch.zeros(4, 16, 16),
        text_of=lambda caption: Conditioning(torch.zeros(1, 8, 32)),
        project=lambda states, time: states,
        mask_of=lambda slot: torch.ones(1, 16, 16),
    )


def loss_of(denoiser, settings, monkeypatch):
    """The loss of a step that trains the whole UNet, and its masters."""
    objective, network = objective_of(denoiser, settings, monkeypatch), denoiser.network
    pictures = from_images([torch.zeros(3, 32, 32)] * 2, ["a", "b"], resolution=None)
    batch = list(enumerate(objective.load(BatchOrder(pictures, 2, 0).batch(1))))
    with fake_cuda(network):
        trainable = SelectedWeights(parameter_refs(network), [network])
        with trainable.attach(rng_key=(1, 0)):
            return objective(batch, 1).per_sample.sum(), trainable.parameters


@pytest.mark.parametrize("settings", LOSSES, ids=["default", "others"])
def test_a_step_is_on_one_device(tiny_model, monkeypatch, settings):
    loss, masters = loss_of(tiny_model.denoiser, TrainingSettings(**settings), monkeypatch)
    assert loss.device.type == "cuda" and loss.requires_grad
    assert {parameter.device.type for parameter in masters.values()} == {"cuda"}


def test_a_tensor_on_the_wrong_device_is_found(tiny_model, monkeypatch):
    """As a target that is left on the CPU would be."""
    monkeypatch.setattr(type(tiny_model.denoiser), "target", lambda *_: torch.zeros(2, 4, 16, 16))
    with pytest.raises(RuntimeError, match="two different devices cuda:0, cpu"):
        loss_of(tiny_model.denoiser, TrainingSettings(), monkeypatch)

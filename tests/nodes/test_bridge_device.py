"""ComfyUI's models on a device that is not the CPU, simulated: the host does not wait for it."""

import pytest
import torch
from retune.training.common import transfer
from retune.training.models.protocols import Conditioning


@pytest.fixture
def device(device, monkeypatch):
    """Copies to it are those to a CUDA device."""
    monkeypatch.setattr(transfer, "STAGING", ("cuda", "lazy"))
    return device


def test_sdxl_is_asked_without_waiting_for_the_device(sdxl, device):
    """Its vector of pooled text and sizes is ComfyUI's."""
    from retune.nodes.bridge.denoiser import ComfyDenoiser
    from retune.nodes.bridge.device import training_mode

    random = torch.Generator().manual_seed(0)
    noisy, pooled = torch.randn(2, 4, 8, 16, generator=random), torch.randn(2, 1280, generator=random)
    with torch.inference_mode(), training_mode():
        denoiser = ComfyDenoiser(sdxl[0])
        model = denoiser.patcher.model
        given = {"pooled_output": pooled, "device": noisy.device, "noise": noisy, "height": 64, "width": 128}
        expected = model.extra_conds(**given)["y"].cond
        assert torch.equal(denoiser._size_conditioning(noisy, Conditioning(pooled, pooled)), expected)
        there = Conditioning(pooled.to("lazy"), pooled.to("lazy"))
        device.reset()
        found = denoiser._size_conditioning(noisy.to("lazy"), there)
        assert found.device.type == "lazy" and not device.reads
        assert torch.equal(found.cpu(), expected)
        sigma = torch.tensor([1.0, 3.0])
        denoiser.sampling.to("lazy")
        try:
            device.reset()
            denoiser.sampling.timestep(sigma.to("lazy"))
            assert not device.reads
        finally:
            denoiser.sampling.to("cpu")

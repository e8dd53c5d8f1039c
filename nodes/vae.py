"""Another VAE for a UNet, with its latent format."""

from __future__ import annotations

import logging
from types import CellType, FunctionType

from comfy_api.latest import io

log = logging.getLogger(__name__)

FORMATS = {"SD1.5": "SD15", "SDXL": "SDXL"}
"""Choice -> class in comfy.latent_formats."""
KEY = "retune.latent_format"


class RetuneSwapVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneSwapVAE",
            display_name="Swap VAE",
            category="retune/model",
            description="Gives a UNet another 4-channel VAE: the model gets the latent format of that VAE in "
            "sampling, training and previews. The UNet has to be trained for it afterwards.",
            search_aliases=["sdxl vae", "latent format", "scale factor"],
            inputs=[
                io.Model.Input("model", tooltip="The model; it is not changed, a patched clone comes out."),
                io.Vae.Input("vae", tooltip="The new VAE: 4 channels, 8 times smaller latents, such as SDXL's."),
                io.Combo.Input(
                    "latent_format",
                    options=list(FORMATS),
                    default="SDXL",
                    tooltip="How latents of this VAE are scaled for the UNet and drawn in previews: SD1.5 0.18215, "
                    "SDXL 0.13025. Choose the family that the VAE comes from.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the new latent format; train it before you sample."),
                io.Vae.Output(tooltip="The new VAE, to use with this model."),
            ],
        )

    @classmethod
    def execute(cls, model, vae, latent_format):
        import comfy.latent_formats

        from .bridge.autoencoder import latent_format_of
        from .common.inputs import expect_given

        expect_given(model=model, vae=vae)
        check_vae(vae)
        before, after = latent_format_of(model), getattr(comfy.latent_formats, FORMATS[latent_format])()
        if before.latent_channels != after.latent_channels:
            raise ValueError(
                f"MODEL's latents have {before.latent_channels} channels; expected {after.latent_channels}, as in "
                "SD1.x, SD2 and SDXL."
            )
        text = scale_warning(before.scale_factor, after.scale_factor)
        for line in text:
            log.warning("%s", line)
        return io.NodeOutput(with_latent_format(model, after), vae, ui={"text": text})


def check_vae(vae) -> None:
    """Raises ValueError unless a VAE makes latents of 4 channels, 8 times smaller than the picture."""
    shrink = vae.spacial_compression_encode()
    if vae.latent_channels != 4 or shrink != 8 or vae.latent_dim != 2:
        raise ValueError(
            f"VAE makes {vae.latent_dim}-D latents of {vae.latent_channels} channels, {shrink} times smaller; expected "
            "2-D, 4 channels, 8 times smaller, as the VAEs of SD1.x, SD2 and SDXL. Other VAEs need another UNet."
        )


def scale_warning(before: float, after: float) -> list[str]:
    """A warning about two scale factors; none when they are equal."""
    if before == after:
        return []
    return [
        f"The latent scale factor changes from {before:.5g} to {after:.5g}. A UNet that has not been trained with the "
        "new VAE draws wrong pictures: train it with this MODEL and VAE first."
    ]


def with_latent_format(model, latent_format):
    """A clone of a MODEL that scales latents by another format (`comfy.latent_formats`).

    The functions that sampling and training call are patched, not the attribute `latent_format`: object patches stay on
    the shared module after sampling, and ComfyUI reads that attribute for the previews of every other clone before it
    removes them.
    """
    from comfy.patcher_extension import WrappersMP

    result = model.clone()
    result.add_object_patch("process_latent_in", latent_format.process_in)
    result.add_object_patch("process_latent_out", latent_format.process_out)
    result.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    result.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, Previews(latent_format))
    return result


class Previews:
    """A sampling wrapper that makes ComfyUI draw the preview of this sampling with a given latent format."""

    def __init__(self, latent_format):
        self.latent_format = latent_format

    def __call__(self, executor, noise, latent_image, sampler, sigmas, denoise_mask=None, callback=None, *args, **more):
        import latent_preview

        if replaceable(callback):
            device = executor.class_obj.model_patcher.load_device
            callback = with_previewer(callback, latent_preview.get_previewer(device, self.latent_format))
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, *args, **more)


def replaceable(callback) -> bool:
    """Whether a sampling callback is the one that `latent_preview.prepare_callback` made."""
    return getattr(callback, "__module__", "") == "latent_preview" and "previewer" in callback.__code__.co_freevars


def with_previewer(callback, previewer):
    """A copy of ComfyUI's preview callback that draws with `previewer`; progress and x0 are passed on as before."""
    names = callback.__code__.co_freevars
    cells = zip(names, callback.__closure__, strict=True)
    closure = tuple(CellType(previewer) if name == "previewer" else cell for name, cell in cells)
    return FunctionType(
        callback.__code__, callback.__globals__, callback.__name__, callback.__defaults__, closure=closure
    )

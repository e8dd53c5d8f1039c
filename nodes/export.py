"""A MODEL with its text encoder and VAE as a diffusers folder."""

from __future__ import annotations

import logging
from pathlib import Path

from comfy_api.latest import io

log = logging.getLogger(__name__)

EXPORTED_OBJECTS = {"model_sampling", "process_latent_in", "process_latent_out"}
"""Object patches of a MODEL that the folder's configs express."""


class RetuneExportDiffusers(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneExportDiffusers",
            display_name="Export Diffusers",
            category="retune/model",
            description="Writes model, text encoder and VAE as a diffusers folder in output/diffusers: it runs without "
            "ComfyUI and this pack. With a T5 the folder holds the few lines of code that run it.",
            search_aliases=["save diffusers", "hugging face folder"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="SD1.x, SD2 or the demo model; LoRA and trained weights are written."),
                io.Clip.Input("clip", tooltip="The SD1.x CLIP of this model, or a T5 from Load T5."),
                io.Vae.Input("vae", tooltip="The VAE that the model samples with."),
                io.String.Input(
                    "folder_name",
                    default="my model",
                    tooltip="Folder in output/diffusers; a number is added when it exists.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The folder written.")],
        )

    @classmethod
    def execute(cls, model, clip, vae, folder_name):
        import folder_paths

        from ..training.commands.export_diffusers import export_pipeline
        from ..training.config.checks import check_run_name
        from .common.inputs import expect_given

        check_run_name(folder_name, "folder_name")
        expect_given(model=model, clip=clip, vae=vae)
        images, text = image_parts(model, vae), text_part(clip)
        path = export_pipeline(Path(folder_paths.get_output_directory()) / "diffusers", folder_name, images, text)
        lines = [str(path), *left_out(model)]
        for line in lines[1:]:
            log.warning("%s", line)
        return io.NodeOutput(str(path), ui={"text": lines})


def image_parts(model, vae):
    """UNet, VAE, kind of prediction and scale factor of a MODEL and VAE, patches applied, fp32 on the CPU.

    Raises ValueError for noise levels or a latent scale that a diffusers config of Stable Diffusion cannot express.
    """
    from ..training.commands.export_diffusers import ImageParts
    from .bridge.autoencoder import latent_format_of
    from .bridge.denoiser import prediction_type_of
    from .common.weights import UNET, patched_weight

    sampling, network = model.get_model_object("model_sampling"), model.model.diffusion_model
    prediction = prediction_type_of(sampling)
    _check_sigmas(sampling.sigmas)
    heads = {m.heads for m in network.modules() if hasattr(m, "to_q") and hasattr(m, "heads")}
    return ImageParts(
        unet={name: patched_weight(model, UNET + name) for name, _ in network.named_parameters()},
        num_heads=heads.pop() if len(heads) == 1 else None,
        prediction_type=prediction,
        vae={name: patched_weight(vae.patcher, name) for name, _ in vae.first_stage_model.named_parameters()},
        scaling_factor=_scale_of(latent_format_of(model)),
    )


def _check_sigmas(sigmas) -> None:
    import torch

    from ..training.models.diffusers import SD1_SCHEDULER, training_sigmas

    expected = training_sigmas(SD1_SCHEDULER)
    if sigmas.shape != expected.shape or not torch.allclose(sigmas.float().cpu(), expected, rtol=1e-3):
        raise ValueError(
            f"MODEL's noise levels end at {sigmas.max().item():.4g}; expected {expected.max().item():.4g}, Stable "
            "Diffusion's own. Remove the node that changes its sampling (zero terminal SNR, another schedule)."
        )


def _scale_of(latent_format) -> float:
    """A latent format's factor; ValueError when it does more than multiply."""
    import torch

    probe = torch.linspace(-2, 2, 4).view(1, 4, 1, 1)
    if not torch.allclose(latent_format.process_in(probe), probe * latent_format.scale_factor):
        raise ValueError(
            f"MODEL's latent format {type(latent_format).__name__} does more than multiply; expected that of SD1.5 or "
            "SDXL."
        )
    return float(latent_format.scale_factor)


def text_part(clip):
    """The exportable text encoder of a CLIP: SD1.x's own, or a T5 of this package. ValueError for others."""
    from .clips.t5_clip import is_t5_clip

    return _t5_part(clip) if is_t5_clip(clip) else _clip_part(clip)


def _clip_part(clip):
    from ..training.commands.export_diffusers import ClipPart
    from ..training.models.clip import clip_config
    from .common.weights import patched_weight

    stage = clip.cond_stage_model
    if [name for name, _ in stage.named_children()] != ["clip_l"]:
        raise ValueError(f"the CLIP is {type(stage).__name__}; expected the CLIP of SD1.x or a T5 from Load T5.")
    prefix = "clip_l.transformer.text_model."
    names = [name for name, _ in stage.named_parameters() if name.startswith(prefix)]
    layers = len(stage.clip_l.transformer.text_model.encoder.layers)
    used = layers + 1 + (-1 if not clip.layer_idx else clip.layer_idx)
    state = {name.removeprefix(prefix): name for name in names}
    state = {short: name for short, name in state.items() if _layer(short) < used}
    tensors = {short: patched_weight(clip.patcher, name) for short, name in state.items()}
    config = clip_config(tensors) | _module_config(stage.clip_l)
    return ClipPart(state=tensors, config=config, tokenizer=Path(clip.tokenizer.clip_l.tokenizer.name_or_path))


def _layer(name: str) -> int:
    """Number of the layer that a CLIP tensor belongs to; -1 outside them."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["encoder", "layers"] else -1


def _module_config(clip_l) -> dict:
    """What the shapes of a CLIP's weights leave open: heads, activation, special tokens."""
    from comfy.clip_model import ACTIVATIONS

    text, special = clip_l.transformer.text_model, clip_l.special_tokens
    first = text.encoder.layers[0]
    return {
        "num_attention_heads": first.self_attn.heads,
        "hidden_act": next(name for name, function in ACTIVATIONS.items() if function is first.mlp.activation),
        "layer_norm_eps": text.final_layer_norm.eps,
        "bos_token_id": special["start"],
        "eos_token_id": special["end"],
        "pad_token_id": special["pad"],
    }


def _t5_part(clip):
    import comfy.sd

    from ..training.commands.export_diffusers import T5Part, find_tokenizer_file
    from .bridge.text_encoder import core_text_encoder
    from .clips.t5_clip import t5_parts

    if clip.layer_idx is not None:
        raise ValueError("the T5 stops at an earlier layer (CLIP Set Last Layer); expected one without that node.")
    source, encoder = t5_parts(clip).source, core_text_encoder(clip)
    _check_without_kept_clip(clip, encoder)
    comfyui = Path(comfy.sd.__file__).parents[1]
    return T5Part(encoder=encoder, tokenizer=find_tokenizer_file(source.path, source.tokenizer.fingerprint, comfyui))


def _check_without_kept_clip(clip, encoder) -> None:
    """Raises ValueError if the CLIP's context is not that of its T5 and projection, `encoder`, alone."""
    tokens = encoder.tokenize(["a"])[0]
    length = encoder.padding.max_tokens if encoder.padding.pad == "max_tokens" else len(tokens)
    length = encoder.projection.tokens or length
    shape = tuple(clip.encode_from_tokens(clip.tokenize("a", disable_weights=True)).shape)
    if shape != (1, length, encoder.width):
        raise ValueError(
            f"the CLIP encodes 'a' to {shape}; its T5 and projection alone give {(1, length, encoder.width)}. Export "
            "a T5 without a kept CLIP."
        )


def left_out(model) -> list[str]:
    """A warning that names changes of a MODEL which a folder cannot hold: all but weights, sampling, latent format."""
    options = model.model_options
    names = [name for name, value in options.get("transformer_options", {}).items() if value]
    names += [name for name in options if name != "transformer_options" and options[name]]
    names += [name for name in model.object_patches if name not in EXPORTED_OBJECTS]
    if not names:
        return []
    return [f"The folder lacks what other nodes added to the MODEL's behaviour ({', '.join(sorted(names))})."]

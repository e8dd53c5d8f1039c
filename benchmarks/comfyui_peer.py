"""ComfyUI's Train LoRA in this process, on the same weights: its node's own `execute`, timed by its progress bar."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch

from ..training.common.rng import generator
from .processes import Case
from .random_models import DIFFUSERS_FILE
from .recorder import LOADING, TRAINING, Recorder

FIXED = {
    "grad_accumulation_steps": 1,
    "learning_rate": 1e-4,
    "optimizer": "AdamW",
    "loss_function": "MSE",
    "seed": 0,
    "lora_dtype": "fp32",
    "quantized_backward": False,
    "algorithm": "LoRA",
    "gradient_checkpointing": False,
    "checkpoint_depth": 1,
    "offloading": False,
    "existing_lora": "[None]",
    "bucket_mode": False,
}
"""What no variant changes. It adapts every layer: the node cannot leave any out."""


class Bar:
    """Stands for ComfyUI's progress bar, which leaves out steps that follow fast on another."""

    def __init__(self, recorder: Recorder):
        self.recorder = recorder

    def update(self, value: int) -> None:
        self.recorder.step()


def prepare(case: Case) -> None:
    """Imports ComfyUI's trainer from its checkout; it then reads no command line of this process."""
    sys.path.insert(0, case.comfyui)
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = case.device == "cpu"
    importlib.import_module("comfy_extras.nodes_train")


def open_model(case: Case) -> object:
    """The UNet as a MODEL that can be read again, which its trainer does before it begins.

    ComfyUI's own loader knows SD1.5 and SDXL by their shapes, in diffusers' layout too. It does not know the demo
    model's, which comes from our loader.
    """
    import comfy.sd

    if case.size == "demo":
        from ..nodes.common.demo_model import load_demo

        return load_demo()[0]
    return comfy.sd.load_diffusion_model(str(Path(case.model) / "unet" / DIFFUSERS_FILE))


def conditioning(case: Case, model: object) -> list:
    """ComfyUI's CONDITIONING of random numbers."""
    config, random = model.model.model_config.unet_config, generator(0, "bench inputs")
    pooled = {"pooled_output": torch.randn(1, 1280, generator=random)} if config.get("adm_in_channels") else {}
    return [[torch.randn(1, 77, config["context_dim"], generator=random), pooled]]


def run_lora(case: Case, recorder: Recorder, precision: str, bypass: bool) -> None:
    """Train LoRA with bypass mode on or off."""
    from comfy_extras import nodes_train

    recorder.begin(LOADING)
    with torch.inference_mode():  # as nodes run
        model = open_model(case)
        samples = torch.randn(case.batch_size, 4, case.pixels // 8, case.pixels // 8, generator=generator(0, "latents"))
        inputs = FIXED | {"batch_size": case.batch_size, "steps": case.rounds + 1, "rank": case.rank}
        inputs |= {"model": model, "training_dtype": precision, "bypass_mode": bypass}
        lists = {name: [value] for name, value in inputs.items()}
        nodes_train.ProgressBar = lambda total: Bar(recorder)
        recorder.begin(TRAINING)
        output = nodes_train.TrainLoraNode.execute(
            latents=[{"samples": samples}], positive=[conditioning(case, model)], **lists
        )
    recorder.trained = sum(value.numel() for name, value in output.result[0].items() if not name.endswith("alpha"))

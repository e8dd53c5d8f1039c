"""The common training in one node: a folder of images, a trigger word, and nothing to set."""

import logging

from comfy_api.latest import io

from ..training.config.folder import FolderConfig
from ..training.config.run import RunConfig
from ..training.config.simple_lora import AUTO, QUALITIES, SimpleLora
from ..training.config.training_settings import CARDS
from .common import types
from .common.inputs import input_of, name_inputs, run_ui
from .common.types import LoraModel
from .dataset import RetuneLoadDataset, resolved
from .train_lora import train

log = logging.getLogger(__name__)


class RetuneTrainLoraFromFolder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RetuneTrainLoraFromFolder",
            display_name="Train LoRA from Folder",
            category="retune/lora",
            description="Trains a LoRA on a folder of images. Resolution, steps, rate, rank and memory settings follow "
            "from the model, the number of images, the quality and the card; the node says which they are.",
            search_aliases=["simple lora training", "easy lora", "train lora", "dreambooth", "character lora"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="From Load Checkpoint: SD1.x, SD2.x or SDXL; or the demo model."),
                io.Clip.Input("clip", tooltip="The checkpoint's text encoder."),
                io.Vae.Input("vae", tooltip="The checkpoint's VAE."),
                input_of(
                    FolderConfig,
                    "folder",
                    default="",
                    tooltip="A folder with images, and captions in .txt files where you have some; a relative one is "
                    "searched for in input/.",
                ),
                input_of(FolderConfig, "trigger_word", default="sks"),
                io.Combo.Input(
                    "quality",
                    options=list(QUALITIES),
                    default="good",
                    tooltip="quick: to see whether it works, best: four or five times as long.",
                ),
                io.Combo.Input(
                    "card",
                    options=[AUTO, *CARDS],
                    default=AUTO,
                    tooltip="Memory of the graphics card. auto: by what this one has.",
                ),
                *name_inputs("my lora"),
                input_of(RunConfig, "resume", optional=True),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the trained LoRA at strength 1."),
                io.Clip.Output(tooltip="The text encoder as it came: it does not train."),
                LoraModel.Output(display_name="lora", tooltip="For Save LoRA, Compare Grid and ComfyUI's LoRA nodes."),
                types.Run.Output(display_name="run", tooltip="The run, for charts and saving."),
                io.String.Output(display_name="derived", tooltip="The values that were derived, by node of the graph."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def fingerprint_inputs(cls, folder="", **_):
        return RetuneLoadDataset.fingerprint_inputs(folder)

    @classmethod
    def execute(cls, model, clip, vae, folder, trigger_word, quality, card, **run):
        from .ui.progress import reporting

        simple = SimpleLora(family_of_model(model), trigger_word.strip(), quality, card, device_memory())
        with reporting(cls, "reading the folder"):
            dataset = load(folder, simple)
        images = len(dataset.examples)
        config = simple.config(images, dataset.captions, **run)
        derived = f"{simple.text(images, config)}\n\n{dataset.report}"
        log.info("%s", derived)
        results = train(cls.hidden, model, clip, vae, dataset, config)
        return io.NodeOutput(*results, derived, ui=run_ui(config.run_name) | {"text": [derived]})


def load(folder: str, simple: SimpleLora):
    """The folder as Load Dataset reads it: captions of metadata.jsonl where there is one, else of text files."""
    from ..training.data.captions import METADATA
    from ..training.data.folder import load_folder

    path = resolved(folder)
    captions = METADATA if (path / METADATA).is_file() else "txt"
    about = {"resolution": simple.resolution, "captions": captions, "trigger_word": simple.trigger_word}
    return load_folder(FolderConfig(folder=path, **about))


def family_of_model(model) -> str:
    """demo, SD1.x, SD2.x or SDXL; empty for others. Raises ValueError when nothing is connected."""
    from .bridge.lora_patches import PatchTarget, family_of
    from .common.demo_model import is_demo
    from .common.inputs import expect_given

    expect_given(model=model)
    return "demo" if is_demo(model) else family_of(PatchTarget(model, {}))


def device_memory() -> int:
    """Bytes of the device that ComfyUI computes on."""
    import comfy.model_management as management

    return management.get_total_memory(management.get_torch_device())

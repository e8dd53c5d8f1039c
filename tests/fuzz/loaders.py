"""Every loader of foreign files with a valid file for it: fixtures, the demo's files, and tiny models made here."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from retune.training.common.files import write_json, write_tensors, write_text
from retune.training.common.foreign import open_tensors, reading
from retune.training.config.folder import FolderConfig
from retune.training.data.folder import load_folder
from retune.training.data.images import load_image
from retune.training.data.prompts import read_prompts
from retune.training.evaluation.prompt_sets import read_prompt_set
from retune.training.formats.embedding import read_embedding
from retune.training.formats.lora import read_lora
from retune.training.formats.lora_report import base_of_lora
from retune.training.loop.checkpoint import load_state
from retune.training.models import ldm
from retune.training.models.clip import ClipTextEncoder
from retune.training.models.clip_tokenizer import load_clip_tokenizer
from retune.training.models.diffusers import load_denoiser, load_model
from retune.training.recipes.apply_results import with_tuned
from retune.training.rewards.load import RewardConfig, load_reward
from retune.training.runs.folder import RunFolder
from retune.training.runs.index import list_runs, run_details
from retune.training.text_encoder.file import read_text_encoder
from retune.training.text_encoder.projection import Projection, read_projection, save_projection
from retune.training.text_encoder.stock_file import read_stock_file
from retune.training.text_encoder.t5 import load_t5
from retune.training.text_encoder.t5_file import read_t5, read_t5_config
from retune.training.text_encoder.tokenizers import load_tokenizer

TESTS = Path(__file__).resolve().parents[1]
FIXTURES = TESTS / "fixtures" / "version_0_1"
DEMO = TESTS.parent / "training" / "demo" / "weights"
WORDS = "a red circle \U0001f642 on the left, é"
CLIP_SIDE, CLIP_WIDTH = 16, 64


@dataclass(frozen=True)
class Loader:
    """A loader and a valid file or folder for it.

    Attributes:
        name: For reports.
        seed: The file or folder.
        file: The file that is made wrong, below the seed; "" for the seed itself.
        load: Reads the seed's copy.
    """

    name: str
    seed: Path
    file: str
    load: Callable[[Path], Any]


@lru_cache
def base_model():
    """The fixtures' model, which results and LoRAs are applied to."""
    return load_model(FIXTURES / "model.safetensors", tokenizer=FIXTURES / "tokenizer")


def loaders(folder: Path) -> list[Loader]:
    """All loaders; the seeds that are made here lie in `folder`."""
    parts = (_models, _text_encoders, _tokenizers, _rewards, _loras, _embeddings, _data, _runs)
    return [loader for part in parts for loader in part(folder)]


def _each(name: str, seed: Path, files: tuple[str, ...], load: Callable[[Path], Any]) -> Iterator[Loader]:
    """A loader of a folder, once for each of the files that are made wrong."""
    return (Loader(f"{name}: {file}", seed, file, load) for file in files)


def _models(folder: Path) -> Iterator[Loader]:
    whole = FIXTURES / "model.safetensors"
    yield Loader("checkpoint", whole, "", lambda path: load_model(path, tokenizer=FIXTURES / "tokenizer"))
    yield Loader("checkpoint's UNet", whole, "", load_denoiser)
    yield from _each("diffusers folder", _diffusers(folder), DIFFUSERS, load_model)
    yield Loader("sizes of a UNet and a VAE", whole, "", _sizes)


def _sizes(path: Path) -> None:
    """What follows from shapes alone; the fixtures' own file describes itself."""
    with open_tensors(path) as file:
        unet, vae = (
            {name.removeprefix(prefix): shape for name, shape in file.shapes.items() if name.startswith(prefix)}
            for prefix in (ldm.UNET_PREFIX, ldm.VAE_PREFIX)
        )
        ldm.unet_names(ldm.unet_config(unet, num_heads=4))
        ldm.vae_names(ldm.vae_config(vae))


DIFFUSERS = (
    *("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json"),
    *("vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json", "text_encoder/model.safetensors"),
    *("scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"),
)


def _diffusers(folder: Path) -> Path:
    """The fixtures' model as diffusers writes it."""
    model, path = base_model(), folder / "diffusers"
    parts = {"unet": model.denoiser, "vae": model.autoencoder, "text_encoder": model.text_encoder}
    for name, part in parts.items():
        part.network.save_pretrained(path / name)
    shutil.copytree(FIXTURES / "tokenizer", path / "tokenizer")
    write_json(path / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    write_json(path / "scheduler" / "scheduler_config.json", settings | {"prediction_type": "epsilon"})
    return path


def _text_encoders(folder: Path) -> Iterator[Loader]:
    t5 = FIXTURES / "t5"
    yield from _each("T5 folder", t5, ("model.safetensors", "tokenizer.json"), _whole_t5)
    pickled, weights = folder / "t5.bin", read_t5(t5)
    torch.save(weights.state_dict, pickled)
    yield Loader("T5 pickle", pickled, "", read_t5)
    sharded = folder / "sharded"
    write_tensors(sharded / "one.safetensors", weights.state_dict)
    write_json(
        sharded / "model.safetensors.index.json", {"weight_map": dict.fromkeys(weights.state_dict, "one.safetensors")}
    )
    yield from _each("sharded T5", sharded, ("model.safetensors.index.json", "one.safetensors"), read_t5)
    yield Loader("text encoder", FIXTURES / "files" / "t5_projection.safetensors", "", read_text_encoder)
    for kind in ("mlp", "timestep resampler"):
        path = folder / f"{kind}.safetensors"
        save_projection(path, Projection(8, 6, kind, pooled_width=4, tokens=3, layers=2))
        yield Loader(kind, path, "", read_projection)
    yield Loader("CLIP", FIXTURES / "files" / "clip_l.safetensors", "", _clip)


def _whole_t5(path: Path) -> None:
    encoder = load_t5(path, Projection(read_t5_config(path)["d_model"], 8, "truncate"))
    encoder.encode(encoder.tokenize([WORDS]))


def _clip(path: Path) -> None:
    state, _ = read_stock_file(path)
    config = base_model().text_encoder.network.config.to_dict()
    with reading(path):
        ClipTextEncoder.from_state(state, config, FIXTURES / "tokenizer")


def _tokenizers(folder: Path) -> Iterator[Loader]:
    yield Loader(
        "tokenizer.json", DEMO / "t5_tokenizer" / "tokenizer.json", "", lambda path: load_tokenizer(path).encode(WORDS)
    )
    if pieces := _sentencepiece(folder):
        yield Loader("sentencepiece", pieces, "", lambda path: load_tokenizer(path).encode(WORDS))
    files = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json")

    def clip(path: Path) -> None:
        load_clip_tokenizer(path, 10**5)(WORDS, add_special_tokens=False)

    yield from _each("CLIP tokenizer", DEMO / "clip_tokenizer", files, clip)


def _sentencepiece(folder: Path) -> Path:
    import sentencepiece

    options = {"vocab_size": 30, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "minloglevel": 2}
    words = [WORDS, "two small blue squares", "a green star, white background"]
    prefix = str(folder / "spiece")
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(words), model_prefix=prefix, **options)
    return folder / "spiece.model"


def _rewards(folder: Path) -> Iterator[Loader]:
    state, tokenizer = _clip_model().state_dict(), FIXTURES / "tokenizer"
    towers, pickled, head = folder / "towers.safetensors", folder / "towers.pt", folder / "head.pth"
    write_tensors(towers, state)
    torch.save({"state_dict": dict(state)}, pickled)
    sizes = ((0, 24, 8), (2, 8, 4), (4, 4, 4), (6, 4, 2), (7, 2, 1))
    layers = {f"layers.{n}.weight": torch.randn(rows, columns) for n, columns, rows in sizes}
    torch.save(layers | {f"layers.{n}.bias": torch.randn(rows) for n, _, rows in sizes}, head)

    def by_prompt(path: Path) -> None:
        reward = load_reward(RewardConfig(kind="CLIP", file=path, tokenizer=tokenizer))
        reward.scores(torch.rand(1, 3, CLIP_SIDE, CLIP_SIDE), [WORDS])

    yield Loader("reward's towers", towers, "", by_prompt)
    yield Loader("reward's pickle", pickled, "", by_prompt)

    def aesthetic(path: Path) -> None:
        load_reward(RewardConfig(kind="aesthetic", file=path, image_tower=towers))

    yield Loader("aesthetic head", head, "", aesthetic)


def _clip_model():
    from transformers import CLIPConfig, CLIPModel

    size = 1 + max(json.loads((FIXTURES / "tokenizer" / "vocab.json").read_bytes()).values())
    shape = {"hidden_size": CLIP_WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1}
    text = shape | {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": 0}
    vision = shape | {"image_size": CLIP_SIDE, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()


def _loras(folder: Path) -> Iterator[Loader]:
    files = FIXTURES / "files"

    def read(path: Path) -> None:
        lora = read_lora(path)
        base_of_lora(lora), [(module.kind, module.shape) for module in lora.modules.values()]

    def apply(path: Path) -> None:
        with_tuned(base_model(), [str(path)])

    for name in ("lora_kohya", "lora_diffusers", "lora_kinds"):
        yield Loader(name, files / f"{name}.safetensors", "", read)
    yield Loader("an applied LoRA", FIXTURES / "runs" / "lora" / "expected" / "lora.safetensors", "", apply)
    yield Loader("an applied model", FIXTURES / "runs" / "train" / "expected" / "model.safetensors", "", apply)
    yield Loader("applied text", FIXTURES / "runs" / "reward" / "expected" / "tuned.safetensors", "", apply)
    from safetensors.torch import load_file

    torch.save(load_file(files / "lora_kohya.safetensors"), folder / "lora.pt")
    yield Loader("LoRA pickle", folder / "lora.pt", "", read)
    peft = folder / "peft"
    peft.mkdir()
    shutil.copy(files / "lora_diffusers.safetensors", peft / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "alpha_pattern": {"to_q": 1},
        "rank_pattern": {"to_.*": 2},
    }
    write_json(peft / "adapter_config.json", settings)
    names = ("adapter_config.json", "adapter_model.safetensors")
    yield from _each("peft", peft, names, lambda path: read(path / "adapter_model.safetensors"))


def _embeddings(folder: Path) -> Iterator[Loader]:
    for path in sorted((FIXTURES / "files" / "embeddings").iterdir()):
        yield Loader(f"embedding {path.name}", path, "", read_embedding)
    content = {"name": "toy", "string_to_param": {"*": {"TORCHTENSOR": [[0.1] * 8] * 2}}}
    info = PngImagePlugin.PngInfo()
    info.add_text("sd-ti-embedding", base64.b64encode(json.dumps(content).encode()).decode())
    Image.new("RGB", (16, 16)).save(folder / "toy.png", pnginfo=info)
    yield Loader("embedding in a picture", folder / "toy.png", "", read_embedding)


def _data(folder: Path) -> Iterator[Loader]:
    pictures = FIXTURES / "pictures"

    def dataset(captions: str) -> Callable[[Path], Any]:
        return lambda path: load_folder(
            FolderConfig(folder=path, captions=captions, resolution=32, on_bad_image="stop")
        )

    yield from _each("folder", pictures, ("0.png", "0.txt"), dataset("txt"))
    listed = folder / "listed"
    shutil.copytree(pictures, listed)
    rows = [json.dumps({"file_name": f"{n}.png", "text": f"picture \u2028 {n}"}) for n in range(4)]
    write_text(listed / "metadata.jsonl", "\n".join(rows) + "\n")
    yield from _each("listed folder", listed, ("metadata.jsonl",), dataset("metadata.jsonl"))
    for suffix in ("jpg", "webp", "gif"):
        Image.open(pictures / "0.png").convert("RGB").save(folder / f"picture.{suffix}")
        yield Loader(f"picture.{suffix}", folder / f"picture.{suffix}", "", load_image)
    prompts = {
        "p.txt": "a red circle\n# no prompt\na star\n",
        "p.jsonl": '{"prompt": "a cat", "weight": 2}\n{"text": "a dog", "category": "animals"}\n',
    }
    tables = {"set.tsv": "Prompt\tCategory\na cat\tanimals\n", "anime.json": '["a cat", "a dog"]'}
    for name, text in (prompts | tables).items():
        write_text(folder / name, text)
        reader = read_prompts if name in prompts else read_prompt_set
        yield Loader(name, folder / name, "", lambda path, reader=reader: list(reader(path)))


def _runs(folder: Path) -> Iterator[Loader]:
    def listed(path: Path) -> None:
        runs = list_runs(path)
        json.dumps([run_details(path, run["id"]) for run in runs], allow_nan=False)

    for kind in ("train", "lora"):
        root = folder / f"{kind} runs"
        shutil.copytree(FIXTURES / "runs" / kind / "stopped", root / "r")
        files = ("r/config.json", "r/status.json", "r/metrics.jsonl", "r/samples/000004_grid.png")
        yield from _each(f"list of {kind} runs", root, files, listed)
        state = ("r/state/latest.safetensors",)
        yield from _each(f"{kind} state", root, state, lambda path: load_state(RunFolder(path / "r")))

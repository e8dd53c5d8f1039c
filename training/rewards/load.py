"""Loads a reward from a config. Errors name the missing file, its source and its folder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from ..common.foreign import FileError, existing_file, metadata_json, read_pickle, read_tensors, reading
from ..demo.files import weights_path
from .clip_towers import Activation, Towers, TowerState, tower_state
from .heads import read_head
from .preprocess import Preprocess, half_range
from .reward import AestheticReward, ClipReward, Reward
from .tokens import ClipTokens

RewardKind = Literal["aesthetic", "PickScore", "HPSv2", "CLIP", "demo aesthetic", "demo CLIP"]
KINDS = get_args(RewardKind)
FOLDER, TOWER_FOLDER = "models/retune_rewards", "models/clip_vision"
HEAD_SOURCE = (
    f"Get sac+logos+ava1-l14-linearMSE.pth from https://github.com/christophschuhmann/improved-aesthetic-predictor and "
    f"put it into {FOLDER}."
)
TOWER_SOURCE = (
    "Get model.safetensors from https://huggingface.co/openai/clip-vit-large-patch14 and put it into "
    f"{TOWER_FOLDER} as clip-vit-large-patch14.safetensors."
)
SOURCES = {
    "PickScore": "Get model.safetensors from https://huggingface.co/yuvalkirstain/PickScore_v1 and put it into "
    f"{FOLDER} as PickScore_v1.safetensors.",
    "HPSv2": "Get HPS_v2.1_compressed.pt (or HPS_v2_compressed.pt) from https://huggingface.co/xswu/HPSv2 and put it "
    f"into {FOLDER}.",
    "CLIP": "Get model.safetensors, image and text tower in one, from https://huggingface.co/openai/clip-vit-large-"
    f"patch14 and put it into {FOLDER} as clip-vit-large-patch14.safetensors.",
}
TYPICAL_SCALE = {
    "aesthetic": 0.5,
    "PickScore": 1.2,
    "HPSv2": 0.02,
    "CLIP": 0.04,
    "demo aesthetic": 2.0,
    "demo CLIP": 0.045,
}
"""Rough standard deviation of scores over prompts, for images of a base model; measured for the demo's rewards."""
OPENCLIP_PAD = 0
_MOST_SCALE = 20
"""Largest logit scale; CLIP's training caps it at ln 100 = 4.6."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """A reward by kind and files; the demo kinds need no files."""

    kind: RewardKind
    """aesthetic (LAION), PickScore, HPSv2 (and 2.1), CLIP (the cosine of any CLIP), or one of the demo model's two."""
    file: Path | None = None
    """Head of the aesthetic; PickScore's, HPSv2's or a CLIP's towers. For a CLIP of two files, its text tower."""
    image_tower: Path | None = None
    """Image tower when `file` holds none: OpenAI's ViT-L/14 for the aesthetic."""
    tokenizer: Path | None = None
    """CLIP tokenizer folder; not needed for the demo kinds."""
    comfyui: Path | None = None
    """Folder of an installed ComfyUI, whose tokenizer is used where none is given."""
    activation: Activation = "auto"
    """auto: quick_gelu below width 1280, as OpenAI's CLIPs have it. LAION's and other ViT-B and ViT-L need gelu."""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; expected one of {', '.join(KINDS)}.")


def load_reward(config: RewardConfig) -> Reward:
    """The reward of a config, frozen, in fp32, on the CPU.

    Raises ValueError or FileNotFoundError for a wrong or missing file, with its name, source page and folder.
    """
    if config.kind.startswith("demo"):
        return _demo(config.kind)
    reward = _aesthetic(config) if config.kind == "aesthetic" else _by_prompt(config)
    reward.files = tuple(path.name for path in (config.file, config.image_tower) if path is not None)
    return reward


def _demo(kind: RewardKind) -> Reward:
    tensors, metadata = read_tensors(weights_path("scorer.safetensors"))
    state, config = tower_state(tensors), metadata_json(metadata, "retune.config")
    scale = TYPICAL_SCALE[kind]
    if kind == "demo aesthetic":
        towers = Towers(TowerState(state.vision), config)
        head = read_head(read_tensors(weights_path("aesthetic.safetensors"))[0])
        return AestheticReward(kind, towers, head, half_range(towers.side), typical_scale=scale)
    towers = Towers(state, config)
    tokens = ClipTokens(weights_path("clip_tokenizer"), config["text_config"]["vocab_size"])
    return ClipReward(kind, towers, tokens, half_range(towers.side), typical_scale=scale)


def _aesthetic(config: RewardConfig) -> Reward:
    head_state = _read(config.file, config.kind, "a head", HEAD_SOURCE)
    tower_file = config.image_tower or config.file
    tensors = head_state if config.image_tower is None else _read(tower_file, config.kind, "a tower", TOWER_SOURCE)
    with _fitting(config.file, HEAD_SOURCE):
        head = read_head(head_state)
    with _fitting(tower_file, TOWER_SOURCE):
        vision = tower_state(tensors).vision
    if not vision and config.image_tower is None:
        raise ValueError(f"aesthetic has no image tower; expected OpenAI's ViT-L/14. {TOWER_SOURCE}")
    with _fitting(tower_file, TOWER_SOURCE):
        towers = Towers(TowerState(vision), activation=config.activation)
        return AestheticReward(
            config.kind, towers, head, Preprocess(towers.side), typical_scale=TYPICAL_SCALE[config.kind]
        )


def _by_prompt(config: RewardConfig) -> Reward:
    source = SOURCES[config.kind]
    given = [path for path in (config.file, config.image_tower) if path is not None]
    state = _join_towers([_towers_in(path, config.kind, source) for path in given or [None]])
    with _fitting(given[0], source):
        if not state.text:
            raise ValueError("it holds no text tower; expected image and text tower in one file.")
        towers = Towers(state, activation=config.activation)
        factor = _factor(config.kind, state)
    text = towers.text.config
    pad = None if config.kind == "CLIP" else OPENCLIP_PAD
    tokens = ClipTokens(_tokenizer(config), text.vocab_size, text.max_position_embeddings, pad)
    scale = TYPICAL_SCALE[config.kind]
    return ClipReward(config.kind, towers, tokens, Preprocess(towers.side), factor=factor, typical_scale=scale)


def _towers_in(path: Path | None, kind: RewardKind, source: str) -> TowerState:
    """The towers in a file; None raises ValueError, as does a file without a readable tower."""
    tensors = _read(path, kind, "towers", source)
    with _fitting(path, source):
        return tower_state(tensors)


def _join_towers(states: Sequence[TowerState]) -> TowerState:
    """The last file's image tower, and the first file's text tower and logit scale, of the files that have one."""
    return TowerState(
        next((part.vision for part in reversed(states) if part.vision), {}),
        next((part.text for part in states if part.text), {}),
        next((part.logit_scale for part in states if part.logit_scale is not None), None),
    )


def _factor(kind: RewardKind, state: TowerState) -> float:
    """The factor of the cosine: PickScore's learned temperature (Kirstain et al. 2023, arXiv 2305.01569), else 1."""
    if kind != "PickScore":
        return 1.0
    if state.logit_scale is None:
        raise ValueError("it holds no logit_scale.")
    if not abs(state.logit_scale) <= _MOST_SCALE:  # also for NaN
        raise ValueError(f"its logit_scale is {state.logit_scale:g}; expected a number up to {_MOST_SCALE}.")
    return math.exp(state.logit_scale)


def _tokenizer(config: RewardConfig) -> Path:
    if config.tokenizer is not None:
        return config.tokenizer
    if config.comfyui is None:
        raise ValueError(
            f"no tokenizer is given for {config.kind}; expected a CLIP tokenizer folder, or an installed ComfyUI that "
            "has one (tokenizer=... or comfyui=...)."
        )
    return config.comfyui / "comfy" / "sd1_tokenizer"


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or a pickle, including those nested as `{"state_dict": ...}`."""
    if path.suffix.lower() in (".safetensors", ".sft"):
        return read_tensors(path)[0]
    content: Any = read_pickle(path)
    while isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path.name} holds a {type(content).__name__}; expected tensors by name.")
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _read(path: Path | None, kind: RewardKind, content: str, source: str) -> dict[str, Tensor]:
    if path is None:
        raise ValueError(f"{kind} needs a file with {content} and none is chosen. {source}")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a file with {content} for {kind}. {source}")
    with _fitting(path, source):
        return read_state(existing_file(path))


@contextmanager
def _fitting(path: Path, source: str) -> Iterator[None]:
    """Names a file whose content does not fit, and where to get the right one, whatever fails inside."""
    try:
        with reading(path, advice=source):
            yield
    except FileError as error:
        raise FileError(str(error) if source in str(error) else f"{error} {source}") from error

"""A CLIP that encodes a prompt with several text encoders and returns the weighted sum of what they say.

The encoders stay what they are: any architecture, each with its own patches, loaded in turn by ComfyUI. What stock
nodes do to a CLIP (clone, LoRA, last layer, tokenizer options) is done to each; what has no meaning for a sum (saving,
hooks, training its weights) is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from .blend_weights import expect_blendable, has_hooks, only_one, shapes_of, with_all_concepts
from .conditioning import blend_entries
from .t5_clip import is_t5_clip

TOKENS = "retune_blend"
"""Key under which the tokens of encoders with a tokenizer of their own travel beside those of the first."""

NO_WEIGHTS = (
    'a blend in space "embeddings" has no weights of its own to train, save, hook or merge ({}). Blend in space '
    '"weights", or do it to the text encoders before the blend.'
)


class NoWeightsError(AttributeError, ValueError):
    """Also an AttributeError, so that `hasattr` is answered."""


class Encoders:
    """Stands where a CLIP has its network: names of weights, which LoRA loaders read, and nothing else."""

    def __init__(self, network: nn.Module):
        self._network = network

    def state_dict(self) -> dict:
        return self._network.state_dict()

    def __getattr__(self, name: str):
        raise NoWeightsError(NO_WEIGHTS.format(name))


@dataclass(frozen=True)
class Member:
    """One text encoder of a blend. reads_first: the tokens of the first member are right for it."""

    weight: float
    clip: Any
    reads_first: bool


@dataclass(frozen=True)
class OwnTokens:
    """The first member's tokens as they were made, and every member's own; None for one that reads the first's."""

    first: dict
    own: tuple[dict | None, ...]


def blend_embeddings(clips: Sequence, weights: Sequence[float]):
    """A CLIP whose context and pooled output are sum_i w_i times those of each CLIP; weight 1 on one alone gives that.

    Text encoders of weight 0 are left out. Each keeps its patches and layer choice. Encodings of other lengths are
    brought to one (`extend_context`). Encodes an empty prompt to see that widths agree.
    Raises ValueError for widths that differ and for encoders with hooks.
    """
    expect_blendable(clips)
    chosen = only_one(weights)
    if chosen is not None:
        return with_all_concepts(clips[chosen], clips, weights) if _plain(clips) else clips[chosen].clone()
    used = [(weight, clip) for weight, clip in _flat(clips, weights) if weight]
    weights, clips = [weight for weight, _ in used], [clip for _, clip in used]
    clips = [with_all_concepts(clip, clips, weights) for clip in clips]
    members = [Member(w, clip, _reads_alike(clips[0], clip)) for w, clip in zip(weights, clips, strict=True)]
    result = clips[0].clone()
    result.__class__ = _blended_class()
    result.cond_stage_model = Encoders(clips[0].cond_stage_model)
    result.retune_members, result.retune_untouched = tuple(members), _state(result.patcher)
    result.encode_from_tokens(result.tokenize(""))
    return result


def is_blend(clip) -> bool:
    """Whether a CLIP was made by `blend_embeddings` of several (or is a clone of one)."""
    return hasattr(clip, "retune_members")


def _plain(clips: Iterable) -> bool:
    return not any(is_blend(clip) for clip in clips)


def _flat(clips: Sequence, weights: Sequence[float]) -> list[tuple[float, Any]]:
    """Weight and CLIP of each text encoder, a blend of blends taken apart."""
    flat = []
    for weight, clip in zip(weights, clips, strict=True):
        members = clip.retune_members if is_blend(clip) else (Member(1.0, clip, True),)
        flat += [(weight * member.weight, member.clip) for member in members]
    return flat


def _reads_alike(first, clip) -> bool:
    """Whether a CLIP's own tokens of any prompt would be those of the first."""
    if clip is first:
        return True
    if is_t5_clip(first) != is_t5_clip(clip) or shapes_of(first) != shapes_of(clip):
        return False
    if first.tokenizer_options != clip.tokenizer_options:
        return False
    if not is_t5_clip(first):
        return type(first.tokenizer) is type(clip.tokenizer)
    one, two = first.cond_stage_model, clip.cond_stage_model
    sources = [(each.retune_source.tokenizer.fingerprint, each.retune_source.padding) for each in (one, two)]
    return sources[0] == sources[1] and one.retune_kept is two.retune_kept


def _state(patcher) -> tuple:
    """What another node may have put on the patcher alone, where no member would see it."""
    objects = sorted((name, id(value)) for name, value in patcher.object_patches.items())
    return patcher.patches_uuid, objects, sorted(getattr(patcher, "injections", None) or ())


def _spread(member: Member, clone) -> Member:
    return Member(member.weight, clone, member.reads_first)


class Blending:
    """What a blend does as a CLIP; goes before comfy.sd.CLIP, see `_blended_class`."""

    def clone(self, *args, **options):
        other = super().clone(*args, **options)
        other.__class__ = _blended_class()
        other.retune_members = tuple(_spread(m, m.clip.clone(*args, **options)) for m in self.retune_members)
        other.retune_untouched = self.retune_untouched
        return other

    def add_patches(self, patches, *args, **options):
        """On every text encoder; those that lack a weight take no notice."""
        keys = [member.clip.add_patches(patches, *args, **options) for member in self.retune_members]
        return list(dict.fromkeys(key for found in keys for key in found))

    def clip_layer(self, layer_idx):
        super().clip_layer(layer_idx)
        for member in self.retune_members:
            member.clip.clip_layer(layer_idx)

    def set_tokenizer_option(self, option_name, value):
        super().set_tokenizer_option(option_name, value)
        for member in self.retune_members:
            member.clip.set_tokenizer_option(option_name, value)

    def tokenize(self, text, return_word_ids=False, **options):
        tokens, *others = (
            None if place and member.reads_first else member.clip.tokenize(text, return_word_ids, **options)
            for place, member in enumerate(self.retune_members)
        )
        if any(others):
            tokens = {**tokens, TOKENS: OwnTokens(dict(tokens), (None, *others))}
        return tokens

    def encode_from_tokens(self, tokens, return_pooled=False, return_dict=False):
        said = [
            member.clip.encode_from_tokens(own, return_pooled=return_pooled, return_dict=True)
            for member, own in self._members_with(tokens)
        ]
        entries = [[more.pop("cond"), more] for more in said]
        context, more = blend_entries(self._shares(), entries)
        if return_dict:
            return {"cond": context, **more}
        return (context, more["pooled_output"]) if return_pooled else context

    def encode_from_tokens_scheduled(self, tokens, unprojected=False, add_dict=None, show_pbar=True):
        schedules = [
            member.clip.encode_from_tokens_scheduled(own, unprojected, dict(add_dict or {}), show_pbar)
            for member, own in self._members_with(tokens)
        ]
        if len({len(one) for one in schedules}) > 1:
            raise ValueError(
                f"the text encoders give {', '.join(str(len(one)) for one in schedules)} conditionings for a "
                "prompt (a timestep resampler gives one for each range of noise levels); expected as many of each."
            )
        return [blend_entries(self._shares(), entries) for entries in zip(*schedules, strict=True)]

    def get_sd(self):
        raise NoWeightsError(NO_WEIGHTS.format("get_sd"))

    def state_dict_for_saving(self):
        raise NoWeightsError(NO_WEIGHTS.format("state_dict_for_saving"))

    def get_key_patches(self):
        raise NoWeightsError(NO_WEIGHTS.format("get_key_patches"))

    def _shares(self) -> list[float]:
        return [member.weight for member in self.retune_members]

    def _members_with(self, tokens) -> list[tuple[Member, dict]]:
        """Each member with what it reads. Raises ValueError where that would not be what was asked for."""
        if _state(self.patcher) != self.retune_untouched or has_hooks(self):
            raise NoWeightsError(NO_WEIGHTS.format("hooks, a bypass LoRA or another patch on its model"))
        others = tokens.get(TOKENS)
        plain = {key: value for key, value in tokens.items() if key != TOKENS}
        if others is None and not all(member.reads_first for member in self.retune_members):
            raise ValueError("the tokens are another CLIP's; expected the blend's own, for every encoder.")
        if others is not None and any(plain.get(key) is not value for key, value in others.first.items()):
            raise ValueError(
                "the prompt has a text for each encoder of a pair, and the blended CLIPs are not alike; expected "
                'one text. Use CLIP Text Encode, or space "weights".'
            )
        own = others.own if others is not None else [None] * len(self.retune_members)
        return [(m, plain if o is None else o) for m, o in zip(self.retune_members, own, strict=True)]


@cache
def _blended_class() -> type:
    import comfy.sd

    return type("BlendedCLIP", (Blending, comfy.sd.CLIP), {})

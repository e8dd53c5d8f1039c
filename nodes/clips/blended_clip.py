"""A CLIP that encodes a prompt with several text encoders and returns the weighted sum of their outputs.

The encoders may be of any architecture. Each keeps its patches, and ComfyUI loads one after the other. What stock nodes
do to a CLIP (clone, LoRA, last layer, tokenizer options) is done to each encoder. What has no meaning for a sum
(saving, hooks, training its weights) is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .blend_weights import expect_blendable, has_hooks, only_one, shapes_of, with_all_concepts
from .conditioning import blend_entries
from .mixins import add_mixin
from .t5_clip import is_t5_clip

TOKENS = "retune_blend"
"""Key in a prompt's tokens of the `MemberTokens`, where some members cannot use the first member's tokens."""

NO_WEIGHTS = (
    'a blend in space "embeddings" has no weights of its own to train, save, hook or merge ({}). Blend in space '
    '"weights", or do it to the text encoders before the blend.'
)


class NoWeightsError(AttributeError, ValueError):
    """Raised for what needs the weights of a blend; an AttributeError too, so that `hasattr` returns False."""


class Encoders:
    """Replaces the network (`cond_stage_model`) of a blend: only the names of its weights, which LoRA loaders read."""

    def __init__(self, network: nn.Module):
        self._network = network

    def state_dict(self) -> dict:
        return self._network.state_dict()

    def __getattr__(self, name: str):
        raise NoWeightsError(NO_WEIGHTS.format(name))


@dataclass(frozen=True)
class Member:
    """A text encoder of a blend."""

    weight: float
    clip: Any
    same_tokens: bool
    """Whether it tokenizes every prompt as the first member does."""


@dataclass(frozen=True)
class MemberTokens:
    """A prompt's tokens for members that tokenize differently."""

    first: dict
    """The first member's, to detect that a node changed them."""
    members: tuple[dict | None, ...]
    """Each member's; None for one that uses the first member's."""


def blend_embeddings(clips: Sequence, weights: Sequence[float]):
    """A CLIP whose context and pooled output are sum_i w_i c_i over those of several CLIPs.

    Each CLIP keeps its patches and layer choice; those of weight 0 are left out. A shorter context is lengthened
    (`lengthened`). With weight 1 on one CLIP and 0 on the others the result is a clone of that one.

    Raises:
        ValueError: for widths that differ (an empty prompt is encoded to check) and for CLIPs with hooks.
    """
    expect_blendable(clips)
    chosen = only_one(weights)
    if chosen is not None:
        no_blends = not any(map(is_blend, clips))
        return with_all_concepts(clips[chosen], clips, weights) if no_blends else clips[chosen].clone()
    return _blended(clips, weights)


def _blended(clips: Sequence, weights: Sequence[float]):
    """A clone of the first CLIP of weight other than 0 that encodes with all of these and blends the results."""
    used = [(weight, clip) for weight, clip in _flat(clips, weights) if weight]
    weights, clips = [weight for weight, _ in used], [clip for _, clip in used]
    clips = [with_all_concepts(clip, clips, weights) for clip in clips]
    members = [Member(w, clip, _same_tokens(clips[0], clip)) for w, clip in zip(weights, clips, strict=True)]
    result = add_mixin(clips[0].clone(), Blended)
    result.cond_stage_model = Encoders(clips[0].cond_stage_model)
    result.retune_members, result.retune_untouched = tuple(members), _state(result.patcher)
    result.encode_from_tokens(result.tokenize(""))
    return result


def is_blend(clip) -> bool:
    """Whether a CLIP comes from `blend_embeddings` of several, or is a clone of one."""
    return hasattr(clip, "retune_members")


def _flat(clips: Sequence, weights: Sequence[float]) -> list[tuple[float, Any]]:
    """Weight and CLIP of each text encoder, with the members of blends in place of these."""
    flat = []
    for weight, clip in zip(weights, clips, strict=True):
        members = clip.retune_members if is_blend(clip) else (Member(1.0, clip, True),)
        flat += [(weight * member.weight, member.clip) for member in members]
    return flat


def _same_tokens(first, clip) -> bool:
    """Whether two CLIPs tokenize every prompt in the same way."""
    if clip is first:
        return True
    if is_t5_clip(first) != is_t5_clip(clip) or shapes_of(first) != shapes_of(clip):
        return False
    if first.tokenizer_options != clip.tokenizer_options:
        return False
    if not is_t5_clip(first):
        return type(first.tokenizer) is type(clip.tokenizer)
    models = first.cond_stage_model, clip.cond_stage_model
    sources = [(model.retune_source.tokenizer.fingerprint, model.retune_source.padding) for model in models]
    return sources[0] == sources[1] and models[0].retune_kept is models[1].retune_kept


def _state(patcher) -> tuple:
    """What other nodes may change on a ModelPatcher alone, where it has no effect on the members of a blend."""
    objects = sorted((name, id(value)) for name, value in patcher.object_patches.items())
    return patcher.patches_uuid, objects, sorted(getattr(patcher, "injections", None) or ())


class Blended:
    """Mixin of a CLIP: what is done to it is done to each of `retune_members`, and their outputs are summed."""

    def clone(self, *args, **options):
        other = add_mixin(super().clone(*args, **options), Blended)
        other.retune_members = tuple(replace(m, clip=m.clip.clone(*args, **options)) for m in self.retune_members)
        other.retune_untouched = self.retune_untouched
        return other

    def add_patches(self, patches, *args, **options):
        """Adds patches to every text encoder that has their weights; returns the keys that any of them has."""
        added = [member.clip.add_patches(patches, *args, **options) for member in self.retune_members]
        return list(dict.fromkeys(key for keys in added for key in keys))

    def clip_layer(self, layer_idx):
        super().clip_layer(layer_idx)
        for member in self.retune_members:
            member.clip.clip_layer(layer_idx)

    def set_tokenizer_option(self, option_name, value):
        super().set_tokenizer_option(option_name, value)
        for member in self.retune_members:
            member.clip.set_tokenizer_option(option_name, value)

    def tokenize(self, text, return_word_ids=False, **options):
        first, *others = (
            None if index and member.same_tokens else member.clip.tokenize(text, return_word_ids, **options)
            for index, member in enumerate(self.retune_members)
        )
        return {**first, TOKENS: MemberTokens(dict(first), (None, *others))} if any(others) else first

    def encode_from_tokens(self, tokens, return_pooled=False, return_dict=False):
        encoded = [
            member.clip.encode_from_tokens(member_tokens, return_pooled=return_pooled, return_dict=True)
            for member, member_tokens in self._members_and_tokens(tokens)
        ]
        entries = [[more.pop("cond"), more] for more in encoded]
        context, more = blend_entries(self._weights(), entries)
        if return_dict:
            return {"cond": context, **more}
        return (context, more["pooled_output"]) if return_pooled else context

    def encode_from_tokens_scheduled(self, tokens, unprojected=False, add_dict=None, show_pbar=True):
        schedules = [
            member.clip.encode_from_tokens_scheduled(member_tokens, unprojected, dict(add_dict or {}), show_pbar)
            for member, member_tokens in self._members_and_tokens(tokens)
        ]
        if len({len(schedule) for schedule in schedules}) > 1:
            raise ValueError(
                f"the text encoders give {', '.join(str(len(schedule)) for schedule in schedules)} conditionings for a "
                "prompt (a timestep resampler gives one for each range of noise levels); expected as many of each."
            )
        return [blend_entries(self._weights(), entries) for entries in zip(*schedules, strict=True)]

    def get_sd(self):
        raise NoWeightsError(NO_WEIGHTS.format("get_sd"))

    def state_dict_for_saving(self):
        raise NoWeightsError(NO_WEIGHTS.format("state_dict_for_saving"))

    def get_key_patches(self):
        raise NoWeightsError(NO_WEIGHTS.format("get_key_patches"))

    def _weights(self) -> list[float]:
        return [member.weight for member in self.retune_members]

    def _members_and_tokens(self, tokens: dict) -> list[tuple[Member, dict]]:
        """Each member with its tokens. Raises ValueError where a node changed the blend's patcher or tokens alone."""
        if _state(self.patcher) != self.retune_untouched or has_hooks(self):
            raise NoWeightsError(NO_WEIGHTS.format("hooks, a bypass LoRA or another patch on its model"))
        separate: MemberTokens | None = tokens.get(TOKENS)
        first = {key: value for key, value in tokens.items() if key != TOKENS}
        if separate is None and not all(member.same_tokens for member in self.retune_members):
            raise ValueError("the tokens are another CLIP's; expected the blend's own, for every encoder.")
        if separate is not None and any(first.get(key) is not value for key, value in separate.first.items()):
            raise ValueError(
                "the prompt has a text for each encoder of a pair, and the blended CLIPs are not alike; expected "
                'one text. Use CLIP Text Encode, or space "weights".'
            )
        if separate is None:
            return [(member, first) for member in self.retune_members]
        pairs = zip(self.retune_members, separate.members, strict=True)
        return [(member, first if its_tokens is None else its_tokens) for member, its_tokens in pairs]

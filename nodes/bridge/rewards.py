"""Rewards under ComfyUI's model management: the value of a RETUNE_REWARD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...training.rewards.augment import Augmentation
from ...training.rewards.combined import CombinedReward, Term
from ...training.rewards.load import RewardConfig, load_reward
from .device import load_fully


class ManagedReward:
    """A weighted sum of rewards, with a ModelPatcher for each network. Immutable.

    Call `load` before scoring, and again whenever ComfyUI may have offloaded the rewards.
    """

    def __init__(self, terms: Sequence[Term], patchers: Sequence, augmentation: Augmentation | None = None):
        self.terms, self.patchers, self.augmentation = tuple(terms), tuple(patchers), augmentation

    @classmethod
    def open(cls, config: RewardConfig, **term) -> ManagedReward:
        """Loads one reward from its files; `term` are the other fields of `Term`. Raises as `load_reward`."""
        import comfy.model_management
        import comfy.model_patcher

        with torch.inference_mode(False):
            reward = load_reward(config)
        patcher = comfy.model_patcher.ModelPatcher(
            reward.network,
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.unet_offload_device(),
        )
        return cls([Term(reward=reward, **term)], [patcher])

    @classmethod
    def joined(cls, rewards: Sequence[ManagedReward], augmentation: Augmentation | None = None) -> ManagedReward:
        """One sum of all terms; `augmentation` replaces those of the rewards."""
        terms = [term for reward in rewards for term in reward.terms]
        return cls(terms, [patcher for reward in rewards for patcher in reward.patchers], augmentation)

    def in_half(self, dtype: torch.dtype) -> ManagedReward:
        """The same rewards for a run in half precision, as copies with their own ModelPatchers; for fp32, itself."""
        import comfy.model_patcher

        if dtype == torch.float32:
            return self
        self.unload()
        copies, patchers = {}, {}
        for term, patcher in zip(self.terms, self.patchers, strict=True):
            if patcher not in patchers:
                with torch.inference_mode(False), torch.no_grad():
                    copies[patcher] = term.reward.copied_in(dtype)
                devices = patcher.load_device, patcher.offload_device
                patchers[patcher] = comfy.model_patcher.ModelPatcher(copies[patcher].network, *devices)
        terms = [replace(term, reward=copies[own]) for term, own in zip(self.terms, self.patchers, strict=True)]
        return ManagedReward(terms, [patchers[own] for own in self.patchers], self.augmentation)

    def combined(self) -> CombinedReward:
        """A new sum, whose running scales are at their start."""
        return CombinedReward(self.terms, self.augmentation)

    def unload(self) -> None:
        """Takes all networks off the device."""
        import comfy.model_management

        for patcher in dict.fromkeys(self.patchers):
            comfy.model_management.unload_model_and_clones(patcher, unload_additional_models=False, all_devices=True)

    def describe(self) -> str:
        """What scores, one a line: name, number of weights, typical spread of scores, weight in a sum."""
        return "\n".join(
            f"{term.reward.name}: {sum(p.numel() for p in patcher.model.parameters()) / 1e6:.3g} M weights, scores "
            f"spread by about {term.reward.typical_scale:g}, weight {term.weight:g}."
            for term, patcher in zip(self.terms, self.patchers, strict=True)
        )

    def load(self, batch: int, gradient: bool = False) -> None:
        """Loads all networks whole, with memory left to score `batch` images.

        Args:
            batch: images that are scored at a time.
            gradient: whether memory for a backward pass through all networks at once is left too.
        """
        memory = self.combined().activation_bytes(batch, gradient)
        load_fully([*dict.fromkeys(self.patchers)], memory)


def expect_reward(reward) -> None:
    """Raises ValueError unless a reward is connected."""
    if not isinstance(reward, ManagedReward):
        raise ValueError("reward is empty; expected one from Load Reward or Combine Rewards.")

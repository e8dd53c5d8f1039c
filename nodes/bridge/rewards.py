"""Rewards under ComfyUI's model management: what RETUNE_REWARD carries."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...training.rewards.augment import Augmentation
from ...training.rewards.combined import CombinedReward, Term
from ...training.rewards.load import RewardConfig, load_reward
from .device import load_fully, without_inference_tensors


class ManagedReward:
    """One or more rewards with their weights in the sum, and a ModelPatcher for each network.

    Immutable: `combined` gives a new sum each time, its running scales at their start. `load` comes before scoring, and
    again after anything else may have pushed the rewards out.
    """

    def __init__(self, terms: Sequence[Term], patchers: Sequence, augmentation: Augmentation | None = None):
        self.terms, self.patchers, self.augmentation = tuple(terms), tuple(patchers), augmentation

    @classmethod
    def open(cls, config: RewardConfig, **term) -> ManagedReward:
        """Reads a reward's files; term: as `Term` takes it, the reward aside. Errors: those of `load_reward`."""
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
        """All their terms as one sum; augmentation: instead of theirs."""
        terms = [term for reward in rewards for term in reward.terms]
        return cls(terms, [patcher for reward in rewards for patcher in reward.patchers], augmentation)

    def combined(self) -> CombinedReward:
        return CombinedReward(self.terms, self.augmentation)

    def load(self, batch: int, gradient: bool = False) -> None:
        """Loads all networks whole, with memory left to score `batch` images.

        Args:
            batch: images that are scored at a time.
            gradient: whether memory for a backward pass through all networks at once is left too.
        """
        memory = self.combined().activation_bytes(batch, gradient)
        load_fully([*dict.fromkeys(self.patchers)], memory)
        for patcher in self.patchers:
            patcher.model.to(patcher.load_device)  # with --novram ComfyUI moves the weights and forgets the buffers
            without_inference_tensors(patcher.model)


def expect_reward(reward) -> None:
    """ValueError unless something is connected."""
    if not isinstance(reward, ManagedReward):
        raise ValueError("reward is empty; expected one from Load Reward or Combine Rewards.")

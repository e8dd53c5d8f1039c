"""Several rewards as one: a weighted sum, each divided by its running scale, up to a target where one is set."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..common.foreign import finite_number
from .augment import Augmentation, augmented
from .preprocess import checked_later, expect_finite
from .reward import Reward, expect_a_prompt_each, title_of
from .scale import RunningScale

Form = Literal["hinge", "distance"]


@dataclass(frozen=True, kw_only=True)
class Term:
    """One reward of a sum."""

    reward: Reward
    weight: float = 1.0
    """0 logs the reward without a gradient; a negative weight lowers the score."""
    target: float | None = None
    """A raw score r that is high enough; None: higher is always better."""
    form: Form = "hinge"
    """With a target: "hinge" is min(r, target), without gradient above the target (ReFL, arXiv 2304.05977); "distance"
    is -|r - target|, which lowers scores above it (AlignProp, arXiv 2310.03739)."""

    def __post_init__(self):
        if self.form not in get_args(Form):
            raise ValueError(f"form is {self.form!r}; expected one of {', '.join(get_args(Form))}.")
        finite_number(self.weight, "weight of a reward")
        if self.target is not None:
            finite_number(self.target, "target of a reward")

    def shaped(self, raw: Tensor) -> Tensor:
        """Raw scores with the target applied."""
        if self.target is None:
            return raw
        return raw.clamp(max=self.target) if self.form == "hinge" else -(raw - self.target).abs()


@dataclass(frozen=True)
class CombinedScores:
    """Scores of a batch of images, in all and by term."""

    total: Tensor
    """(B,), the weighted sum of the normalised scores: the objective."""
    raw: dict[str, Tensor] = field(default_factory=dict)
    """(B,) by term, detached, as the rewards return them."""
    normalised: dict[str, Tensor] = field(default_factory=dict)
    """(B,) by term, detached, with target and running scale applied."""

    @staticmethod
    def cat(parts: Sequence[CombinedScores]) -> CombinedScores:
        """The scores of consecutive parts of a batch as those of the batch."""
        total = torch.cat([part.total for part in parts])
        raw = {name: torch.cat([part.raw[name] for part in parts]) for name in parts[0].raw}
        normalised = {name: torch.cat([part.normalised[name] for part in parts]) for name in parts[0].normalised}
        return CombinedScores(total, raw, normalised)

    def means(self) -> dict[str, Tensor]:
        """Means over the batch for the metrics: "reward", and `<name>` and `<name> normalised` of each term."""
        figures = {"reward": self.total.detach().mean()}
        for name in self.raw:
            figures |= {name: self.raw[name].mean(), f"{name} normalised": self.normalised[name].mean()}
        return figures


class CombinedReward:
    """total_i = sum over terms k of weight_k x shaped_k(r_ki) / s_k, with s_k the term's `RunningScale`.

    Scoring has no side effects; `observe` updates the scales by a step's scores, so a run is a function of `state`.

    Args:
        terms: one or more. A term is named after its reward, with a number from the second of a name on.
        augmentation: applied where draws are given, a row for each image, the same for all terms.

    Raises:
        ValueError: there are no terms.
    """

    typical_scale = 1.0

    def __init__(self, terms: Sequence[Term], augmentation: Augmentation | None = None):
        if not terms:
            raise ValueError("rewards are empty; expected at least one.")
        self.augmentation = augmentation
        self.terms = dict(zip(_names([term.reward.name for term in terms]), terms, strict=True))
        self.reset()
        self.network = nn.ModuleList(term.reward.network for term in terms)
        about = [(t.reward.fingerprint, t.weight, t.target, t.form) for t in terms] + [augmentation]
        self.fingerprint = hashlib.sha256(repr(about).encode()).hexdigest()[:32]
        self.name = " + ".join(self.terms)
        self.reads_prompts = any(term.reward.reads_prompts for term in terms)
        self.compares_images = any(term.reward.compares_images for term in terms)

    def describe(self) -> list[dict[str, Any]]:
        """For a file's metadata: reward, weight, target and form (with a target), and names of files of each term."""
        terms = []
        for name, term in self.terms.items():
            limit = {} if term.target is None else {"target": term.target, "form": term.form}
            terms.append({"reward": name, "weight": term.weight, **limit, "files": list(term.reward.files)})
        return terms

    def reset(self) -> None:
        """Sets the running scales as at the start of a run."""
        self.scales = {name: RunningScale(term.reward.typical_scale) for name, term in self.terms.items()}

    def evaluate(self, images: Tensor, prompts: Sequence[str], draws: Tensor | None = None) -> CombinedScores:
        """Scores of images, with `total` differentiable to them.

        Args:
            images: (B, 3, H, W) in 0..1.
            prompts: one for each image.
            draws: (B, 4) of `draw_augmentation`; None: none is applied.
        """
        expect_a_prompt_each(images, prompts)
        images = self._augmented(images, draws)
        return self._sum({name: self._part(name, images, prompts) for name in self.terms})

    def value_and_gradient(
        self, images: Tensor, prompts: Sequence[str], draws: Tensor | None = None
    ) -> tuple[CombinedScores, Tensor]:
        """The scores, detached, and d sum(total) / d images, with one reward's graph in memory at a time.

        The device is not read: `expect_finite` looks at the scores once they are on the host.

        Args:
            images: (B, 3, H, W) in 0..1.
            prompts: one for each image.
            draws: (B, 4) of `draw_augmentation`; None: none is applied.

        Raises:
            ValueError: a reward has a weight other than 0 and is not differentiable.
        """
        expect_a_prompt_each(images, prompts)
        with torch.enable_grad(), checked_later():
            leaf = images.detach().requires_grad_(True)
            scored = self._augmented(leaf, draws)
            cut = scored.detach().requires_grad_(True)
            parts = {}
            for name in self.terms:
                raw, part = self._part(name, cut, prompts)
                weight = self.terms[name].weight
                if weight != 0 and not part.requires_grad:
                    raise ValueError(
                        f"{name} gives no gradient to the pictures; expected a differentiable reward, or weight 0, "
                        "which logs it alone."
                    )
                if part.requires_grad:
                    (weight * part).sum().backward()
                parts[name] = (raw, part.detach())
            gradient = torch.zeros_like(cut) if cut.grad is None else cut.grad
            if scored is not leaf:
                (gradient,) = torch.autograd.grad(scored, leaf, gradient)
        return self._sum(parts), gradient

    def rehearse(self, images: Tensor) -> None:
        """Does the work of `value_and_gradient` that takes memory, on images without values: no scores are read."""
        for term in self.terms.values():
            with torch.set_grad_enabled(term.weight != 0):
                leaf = images.detach().requires_grad_(term.weight != 0)
                embeddings = term.reward.image_embeddings(leaf)
            if embeddings.requires_grad:
                torch.autograd.grad(embeddings.sum(), leaf)

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) totals without augmentation."""
        return self.evaluate(images, prompts).total

    @torch.no_grad()
    def comparable(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) totals with the terms' typical scales in place of the running ones, comparable from step to step."""
        expect_a_prompt_each(images, prompts)
        total = torch.zeros(len(images))
        for term in self.terms.values():
            shaped = term.shaped(term.reward.scores(images, prompts)).cpu()
            total = total + term.weight * shaped / term.reward.typical_scale
        return total

    def observe(self, raw: Mapping[str, Sequence[float]]) -> None:
        """Updates the running scales by raw scores, a list by term; call it once a step, after the step's gradient."""
        for name, scores in raw.items():
            self.scales[name].update(scores)

    def expect_finite(self, raw: Mapping[str, Sequence[float]]) -> None:
        """Raises ValueError where one of the raw scores, a list by term, is NaN or infinite."""
        for name, scores in raw.items():
            expect_finite(title_of(name, self.terms[name].reward.files), torch.tensor(scores))

    def state(self) -> dict[str, dict[str, float]]:
        """The running scales for a run's state, exact in JSON."""
        return {name: scale.state() for name, scale in self.scales.items()}

    def load_state(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Restores the running scales from `state()`. Raises ValueError for those of other rewards."""
        if list(state) != list(self.terms):
            raise ValueError(f"the state is of {', '.join(state)}; expected {', '.join(self.terms)}.")
        self.scales = {name: RunningScale(**values) for name, values in state.items()}

    def image_embeddings(self, images: Tensor) -> Tensor:
        """Embeddings by the first reward's image tower; see `Reward`."""
        return next(iter(self.terms.values())).reward.image_embeddings(images)

    def checkpoint(self, enabled: bool) -> None:
        for term in self.terms.values():
            term.reward.checkpoint(enabled)

    def activation_bytes(self, batch: int, gradient: bool = True) -> int:
        """Bytes for `evaluate`, which holds all rewards' graphs; `value_and_gradient` needs the largest of them."""
        return sum(term.reward.activation_bytes(batch, gradient) for term in self.terms.values())

    def _augmented(self, images: Tensor, draws: Tensor | None) -> Tensor:
        if self.augmentation is None or draws is None:
            return images
        return augmented(images, self.augmentation, draws)

    def _part(self, name: str, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """A term's raw scores, detached, and its normalised ones."""
        term = self.terms[name]
        with torch.set_grad_enabled(torch.is_grad_enabled() and term.weight != 0):
            raw = term.reward.scores(images, prompts)
            return raw.detach(), term.shaped(raw) / self.scales[name].scale

    def _sum(self, parts: Mapping[str, tuple[Tensor, Tensor]]) -> CombinedScores:
        device = next(iter(parts.values()))[1].device
        total = sum(self.terms[name].weight * part.to(device) for name, (_, part) in parts.items())
        raw = {name: scores for name, (scores, _) in parts.items()}
        return CombinedScores(total, raw, {name: part.detach() for name, (_, part) in parts.items()})


def _names(names: Sequence[str]) -> list[str]:
    """The names, with a number from the second occurrence of each on."""
    counts: Counter[str] = Counter()
    result = []
    for name in names:
        counts[name] += 1
        result.append(name if counts[name] == 1 else f"{name} {counts[name]}")
    return result

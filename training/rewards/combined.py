"""Several rewards as one: weighted, each divided by its running scale, up to a target where one is set."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .augment import Augmentation, augmented
from .reward import Reward, expect_a_prompt_each
from .scale import RunningScale

Form = Literal["hinge", "distance"]


@dataclass(frozen=True, kw_only=True)
class Term:
    """One reward of a sum.

    weight: 0 logs the reward without gradient; a negative one punishes. target: a raw score beyond which more is not
    wanted. form: "hinge" counts min(r, target), so that a score above it has no gradient (ReFL, arXiv 2304.05977);
    "distance" counts -|r - target|, which pulls back (AlignProp, arXiv 2310.03739).
    """

    reward: Reward
    weight: float = 1.0
    target: float | None = None
    form: Form = "hinge"

    def __post_init__(self):
        if self.form not in get_args(Form):
            raise ValueError(f"form is {self.form!r}; expected one of {', '.join(get_args(Form))}.")

    def shaped(self, raw: Tensor) -> Tensor:
        if self.target is None:
            return raw
        return raw.clamp(max=self.target) if self.form == "hinge" else -(raw - self.target).abs()


@dataclass(frozen=True)
class CombinedScores:
    """total: (B,), what is maximised. raw and normalised: (B,) by term name, detached; total is the weighted sum of the
    normalised ones."""

    total: Tensor
    raw: dict[str, Tensor] = field(default_factory=dict)
    normalised: dict[str, Tensor] = field(default_factory=dict)

    def means(self) -> dict[str, float]:
        """What a log shows: "reward", and `<name>` and `<name> normalised` of each term."""
        figures = {"reward": self.total.mean().item()}
        for name in self.raw:
            figures |= {name: self.raw[name].mean().item(), f"{name} normalised": self.normalised[name].mean().item()}
        return figures


class CombinedReward:
    """total_i = sum over terms k of weight_k x shaped_k(r_ki) / s_k, with s_k the term's `RunningScale`.

    Scoring changes nothing; `observe` takes a step's scores into the scales, so a run is a function of `state`. Names
    are the rewards', numbered where two are alike. augmentation: applied where a generator is given, one draw an image
    for all terms. Errors: ValueError for no terms.
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

    def describe(self) -> list[dict[str, Any]]:
        """Each term for a file's metadata: its name, weight, limit if there is one, and the files it was read from."""
        found = []
        for name, term in self.terms.items():
            limit = {} if term.target is None else {"target": term.target, "form": term.form}
            found.append({"reward": name, "weight": term.weight, **limit, "files": list(term.reward.files)})
        return found

    def reset(self) -> None:
        """The running scales as at the start of a run."""
        self.scales = {name: RunningScale(term.reward.typical_scale) for name, term in self.terms.items()}

    def evaluate(
        self, images: Tensor, prompts: Sequence[str], generator: torch.Generator | None = None
    ) -> CombinedScores:
        """Scores of (B, 3, H, W) images in 0..1, `total` differentiable to them; generator: draws the augmentation."""
        expect_a_prompt_each(images, prompts)
        images = self._seen(images, generator)
        parts = {name: self._part(name, images, prompts) for name in self.terms}
        return self._joined(parts)

    def value_and_gradient(
        self, images: Tensor, prompts: Sequence[str], generator: torch.Generator | None = None
    ) -> tuple[CombinedScores, Tensor]:
        """The scores, detached, and d sum(total) / d images, with one reward's graph in memory at a time.

        Raises ValueError for a reward with a weight and without a gradient.
        """
        expect_a_prompt_each(images, prompts)
        with torch.enable_grad():
            leaf = images.detach().requires_grad_(True)
            seen = self._seen(leaf, generator)
            cut = seen.detach().requires_grad_(True)
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
            if seen is not leaf:
                (gradient,) = torch.autograd.grad(seen, leaf, gradient)
        return self._joined(parts), gradient

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) totals without augmentation."""
        return self.evaluate(images, prompts).total

    @torch.no_grad()
    def comparable(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) totals in the terms' typical scales, whatever was observed: they compare from step to step."""
        expect_a_prompt_each(images, prompts)
        total = torch.zeros(len(images))
        for term in self.terms.values():
            shaped = term.shaped(term.reward.scores(images, prompts)).cpu()
            total = total + term.weight * shaped / term.reward.typical_scale
        return total

    def observe(self, scores: CombinedScores) -> None:
        """Takes raw scores into the running scales; call it once a step, after the step's gradient."""
        for name, raw in scores.raw.items():
            self.scales[name].update(raw.double().tolist())

    def state(self) -> dict[str, dict[str, float]]:
        """The running scales, for a run's state; JSON keeps them exactly."""
        return {name: scale.state() for name, scale in self.scales.items()}

    def load_state(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Goes on from `state()`. ValueError for that of other rewards."""
        if list(state) != list(self.terms):
            raise ValueError(f"the state is of {', '.join(state)}; expected {', '.join(self.terms)}.")
        self.scales = {name: RunningScale(**values) for name, values in state.items()}

    def image_embeddings(self, images: Tensor) -> Tensor:
        """The first reward's."""
        return next(iter(self.terms.values())).reward.image_embeddings(images)

    def checkpoint(self, enabled: bool) -> None:
        for term in self.terms.values():
            term.reward.checkpoint(enabled)

    def activation_bytes(self, batch: int, gradient: bool = True) -> int:
        """As of `evaluate`, which holds all graphs together; `value_and_gradient` needs the largest of them."""
        return sum(term.reward.activation_bytes(batch, gradient) for term in self.terms.values())

    def _seen(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.augmentation is None or generator is None:
            return images
        return augmented(images, self.augmentation, generator)

    def _part(self, name: str, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """A term's raw scores, detached, and its normalised ones."""
        term = self.terms[name]
        with torch.set_grad_enabled(torch.is_grad_enabled() and term.weight != 0):
            raw = term.reward.scores(images, prompts)
            return raw.detach(), term.shaped(raw) / self.scales[name].scale

    def _joined(self, parts: Mapping[str, tuple[Tensor, Tensor]]) -> CombinedScores:
        device = next(iter(parts.values()))[1].device
        total = sum(self.terms[name].weight * part.to(device) for name, (_, part) in parts.items())
        raw = {name: one for name, (one, _) in parts.items()}
        return CombinedScores(total, raw, {name: part.detach() for name, (_, part) in parts.items()})


def _names(names: Sequence[str]) -> list[str]:
    """The names, with a number from the second of a kind on."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name} {seen[name]}")
    return result

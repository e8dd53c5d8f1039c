"""Methods to backpropagate through the sampler in reward tuning: memory and time of one training step by each.

All draw the same pictures from the same prompts and noise. Step by step, joint and checkpointed compute the same
gradient of the text encoder: that of the last K sampler steps, stopped at the latents which the UNet reads. The
schedule of TextCraftor's code (arXiv 2403.18978, github.com/snap-research/textcraftor) minimises another objective; it
is ported unchanged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..training.commands.open_model import DEMO, ModelConfig, build_model
from ..training.common.callbacks import Callbacks
from ..training.common.rng import generator
from ..training.config.checks import check_range
from ..training.config.reward import RewardTuneConfig
from ..training.data.prompts import PromptSlot
from ..training.models.parameters import gradients_required
from ..training.models.protocols import Conditioning, TextToImage
from ..training.objectives.reward import RewardObjective
from ..training.recipes.reward import build_trainable
from ..training.rewards.combined import CombinedReward
from ..training.rewards.parse import read_rewards
from ..training.sampling.guidance import Guidance
from ..training.sampling.rollout import Step, ddim_chain, first_latent, guided_output, rollout
from ..training.trainables.base import Trainable
from .memory import peak_saved_bytes
from .study import markdown_table
from .timing import median_seconds

DESCRIPTION = (
    "Memory and time of a reward tuning step at several K: step by step, joint, checkpointed, and as published."
)
STEPWISE, JOINT, CHECKPOINTED, OFFICIAL = "step by step", "joint", "joint, UNet checkpointed", "TextCraftor's schedule"
OFFICIAL_STEPS = 5
"""The K of TextCraftor's code, whose batch is 4 pictures a GPU."""
PROMPT = "two small red circles on the left, white background"
NO_CUDA = (
    "No CUDA device is here, so memory is what autograd saves, without weights, and seconds are processor time of all "
    "threads. Batch, memory and seconds at 512 pixels need a GPU: bench reward-methods --model FILE --rewards ... "
    "--pixels 512 --gradient-steps 5 --batch-size 4."
)


@dataclass(frozen=True, kw_only=True)
class RewardBenchConfig:
    """Size and model of the `reward-methods` benchmark."""

    model: str = DEMO
    """diffusers folder, .safetensors checkpoint, or "demo"."""
    rewards: tuple[str, ...] = ("demo aesthetic", "demo CLIP")
    """As for the verb `reward`."""
    pixels: int = 64
    """Side of the pictures, a multiple of 8."""
    gradient_steps: tuple[int, ...] = (1, 5, 10, 25)
    """Values of K, each at most sampling_steps."""
    sampling_steps: int = 25
    """Steps of the sampler (T)."""
    rounds: int = 7
    """Turns of every method, after one that is not counted."""
    batch_size: int = 16
    """Pictures in a step."""

    def __post_init__(self) -> None:
        check_range(self, pixels=(8, 8192), sampling_steps=(1, 1000), rounds=(1, 10**4), batch_size=(1, 10**4))
        if not self.gradient_steps:
            raise ValueError("gradient_steps are empty; expected at least one.")
        for steps in self.gradient_steps:
            self.tuning(steps)

    def tuning(self, gradient_steps: int) -> RewardTuneConfig:
        """The tuning whose training step is measured; ValueError for more gradient_steps than sampling_steps."""
        return RewardTuneConfig(
            run_name="bench",
            batch_size=self.batch_size,
            gradient_steps=gradient_steps,
            sampling_steps=self.sampling_steps,
            width=self.pixels,
            height=self.pixels,
        )


@dataclass(frozen=True)
class Bench:
    """The model, rewards and trainable that all methods share."""

    model: TextToImage
    reward: CombinedReward
    config: RewardBenchConfig
    trainable: Trainable

    @classmethod
    def open(cls, config: RewardBenchConfig, comfyui: Path | None = None) -> Bench:
        """Loads model and rewards, on the GPU if there is one. Errors: those of the loaders."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        reward = read_rewards(config.rewards, comfyui=comfyui)
        reward.network.to(device)
        model = build_model(ModelConfig(model=config.model, comfyui=comfyui, device=device))
        return cls(model, reward, config, build_trainable(model, config.tuning(1)))

    @property
    def prompts(self) -> list[str]:
        return [PROMPT] * self.config.batch_size

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter of the model and the rewards, trained or not."""
        parts = [self.model.denoiser.network, self.model.autoencoder.network, self.reward.network]
        base = [target.tensor for target in self.model.text_encoder.weights.values()]
        return [*(p for part in parts for p in part.parameters()), *base, *self.trainable.parameters.values()]

    def encode_prompts(self, cfg: float) -> Guidance:
        """The prompts and as many empty ones, encoded with the text encoder's present weights."""
        encoder, device = self.model.text_encoder, self.model.denoiser.device
        positive, empty = (encoder.encode(encoder.tokenize([text])).to(device) for text in (PROMPT, ""))
        count = self.config.batch_size
        return Guidance(Conditioning.cat([positive] * count), Conditioning.cat([empty] * count), cfg)

    def noise(self, tuning: RewardTuneConfig) -> Tensor:
        """(B, C, h, w) noise of a tuning's first training step."""
        cells = self.config.pixels // self.model.autoencoder.downscale
        shape = (self.model.denoiser.latent_channels, cells, cells)
        generators = (generator(tuning.seed, "noise", 1, i) for i in range(self.config.batch_size))
        noise = [torch.randn(shape, generator=each) for each in generators]
        return torch.stack(noise).to(self.model.denoiser.device)


Key = tuple[str, int]
"""Method and K."""
Method = Callable[[Bench, int], Callable[[], None]]
"""(bench, K) -> a function that runs forward and backward of one training step and leaves gradients in .grad."""


def step_by_step(bench: Bench, gradient_steps: int) -> Callable[[], None]:
    """Retune's own: one UNet graph at a time, as the verb `reward` trains."""
    tuning = bench.config.tuning(gradient_steps)
    objective = RewardObjective(bench.model, bench.reward, tuning, bench.trainable, text_trains=True)
    slots = [PromptSlot(prompt, 1, i) for i, prompt in enumerate(bench.prompts)]

    def run() -> None:
        with bench.trainable.attach(rng_key=(1, 0)):
            objective(list(enumerate(objective.load(slots))), 1).per_sample.mean().backward()

    return run


def joint(bench: Bench, gradient_steps: int, checkpointed: bool = False) -> Callable[[], None]:
    """One graph of text encoder, last K steps with the gradient stopped at their input latents, decoder and rewards."""
    tuning = bench.config.tuning(gradient_steps)

    def run() -> None:
        with bench.trainable.attach(rng_key=(1, 0)):
            guidance = bench.encode_prompts(tuning.cfg)
            x = _last_latent(bench, tuning, guidance, guidance, stop_gradient=True, checkpointed=checkpointed)
            score = bench.reward.evaluate(bench.model.autoencoder.pixels(x), bench.prompts).total
            (-score.mean()).backward()

    return run


def official(bench: Bench, gradient_steps: int) -> Callable[[], None]:
    """As TextCraftor's code trains.

    The first steps read the original text encoder, the last K the tuned one, with every UNet call checkpointed and the
    gradient not stopped at the latents. Pictures are clamped to 0..1, all rewards are in one graph, and UNet and
    rewards are not frozen: all of their weights get gradients that are never used.
    """
    tuning, networks = bench.config.tuning(gradient_steps), [bench.model.denoiser.network, bench.reward.network]

    def run() -> None:
        with torch.no_grad():
            original = bench.encode_prompts(tuning.cfg)
        with bench.trainable.attach(rng_key=(1, 0)), gradients_required(networks, True):
            guidance = bench.encode_prompts(tuning.cfg)
            x = _last_latent(bench, tuning, original, guidance, stop_gradient=False, checkpointed=True)
            score = bench.reward.evaluate(bench.model.autoencoder.decode(x), bench.prompts).total
            (-score.mean()).backward()

    return run


def _last_latent(
    bench: Bench,
    tuning: RewardTuneConfig,
    first: Guidance,
    last: Guidance,
    *,
    stop_gradient: bool,
    checkpointed: bool,
) -> Tensor:
    """The chain's last latent (B, C, h, w), with the graph of its last K steps.

    Args:
        first, last: Guidance of the steps before the last K, and of those.
        stop_gradient: The UNet reads each latent detached.
        checkpointed: Recompute the UNet's activations in the backward pass.
    """
    denoiser = bench.model.denoiser
    chain = ddim_chain(denoiser, tuning.sampling_steps)
    count = len(chain) - tuning.gradient_steps
    x = rollout(denoiser, first_latent(denoiser, bench.noise(tuning), chain), chain[:count], first)[-1]
    for step in chain[count:]:
        x = _advance(denoiser, x, x.detach() if stop_gradient else x, step, last, checkpointed)
    return x


def _advance(denoiser, x: Tensor, unet_input: Tensor, step: Step, guidance: Guidance, checkpointed: bool) -> Tensor:
    """One sampler step from x; unet_input: x, or x detached."""

    def output(unet_input: Tensor, *tensors: Tensor) -> Tensor:
        return guided_output(denoiser, unet_input, step, _replace_tensors(guidance, tensors))

    arguments = (unet_input, *guidance.tensors)
    # Reentrant, or `peak_saved_bytes` would miss the activations that are recomputed.
    out = checkpoint(output, *arguments, use_reentrant=True) if checkpointed else output(*arguments)
    return step.a.to(x) * x + step.b.to(x) * out


def _replace_tensors(guidance: Guidance, tensors: Sequence[Tensor]) -> Guidance:
    """The guidance with other tensors, in the order of `Guidance.tensors`."""
    rest = iter(tensors)

    def replaced(cond: Conditioning) -> Conditioning:
        return replace(cond, context=next(rest), pooled=None if cond.pooled is None else next(rest))

    return Guidance(replaced(guidance.positive), replaced(guidance.negative), guidance.cfg)


METHODS: dict[str, Method] = {
    STEPWISE: step_by_step,
    JOINT: joint,
    CHECKPOINTED: lambda bench, gradient_steps: joint(bench, gradient_steps, checkpointed=True),
    OFFICIAL: official,
}


def run_reward_bench(
    config: RewardBenchConfig, comfyui: Path | None = None, callbacks: Callbacks | None = None
) -> dict:
    """Measures every method at every K.

    Args:
        comfyui: An installed ComfyUI, to take the CLIP tokenizer from.

    Returns:
        `build_result`: rows, the flatness of memory over K, and a Markdown table.

    Raises:
        ValueError, FileNotFoundError: For a model or reward that is not there.
    """
    callbacks = callbacks or Callbacks()
    bench = Bench.open(config, comfyui)
    steps = make_steps(bench)
    memory = {}
    for (method, k), run in steps.items():
        callbacks.on_text(f"memory of {method}, K = {k}")
        memory[method, k] = measure_memory(bench, run)
    callbacks.on_text(f"{len(steps)} ways, {config.rounds + 1} turns each")
    timed = {key: _then_clear(bench, run) for key, run in steps.items()}
    return build_result(config, memory, median_seconds(timed, config.rounds, _clock))


def make_steps(bench: Bench) -> dict[Key, Callable[[], None]]:
    """(method, K) -> one training step; TextCraftor's schedule with its published K alone."""
    config = bench.config
    keys = [(method, k) for k in config.gradient_steps for method in METHODS if method != OFFICIAL]
    keys.append((OFFICIAL, min(OFFICIAL_STEPS, config.sampling_steps)))
    return {(method, k): METHODS[method](bench, k) for method, k in keys}


def measure_memory(bench: Bench, run: Callable[[], None]) -> dict[str, float]:
    """Memory of one training step in MiB.

    Returns:
        "memory": on a CPU the peak of the bytes that autograd saves, on a GPU the allocator's peak above the bytes
        allocated before, with "allocated", the whole peak. "gradients": the bytes in .grad of all parameters.
    """
    _clear(bench)
    if bench.model.denoiser.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = torch.cuda.max_memory_allocated()
        sizes = {"memory": peak - before, "allocated": peak}
    else:
        sizes = {"memory": peak_saved_bytes(run, bench.parameters())}
    sizes["gradients"] = sum(p.grad.nbytes for p in bench.parameters() if p.grad is not None)
    _clear(bench)
    return {name: size / 2**20 for name, size in sizes.items()}


def _clear(bench: Bench) -> None:
    for parameter in bench.parameters():
        parameter.grad = None


def _then_clear(bench: Bench, run: Callable[[], None]) -> Callable[[], None]:
    def run_and_clear() -> None:
        run()
        _clear(bench)

    return run_and_clear


def _clock() -> float:
    """Seconds of wall time after the GPU is done; without a GPU, processor seconds of this process."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def build_result(
    config: RewardBenchConfig, memory: Mapping[Key, Mapping[str, float]], seconds: Mapping[Key, float]
) -> dict:
    """The measurements as JSON.

    Args:
        memory: `measure_memory` by method and K.
        seconds: Median seconds by method and K.

    Returns:
        "rows" by "way" (the method) and "K", where "ratio" is seconds over those step by step at the same K;
        "flatness" by method; config, threads, device, note and table.
    """
    rows = []
    for (method, k), found in memory.items():
        sizes = {f"{name} (MiB)": round(size, 2) for name, size in found.items()}
        stepwise = seconds.get((STEPWISE, k))
        ratio = None if stepwise is None else round(seconds[method, k] / stepwise, 3)
        rows.append({"way": method, "K": k, **sizes, "seconds": round(seconds[method, k], 4), "ratio": ratio})
    rows.sort(key=lambda row: (list(METHODS).index(row["way"]), row["K"]))
    cuda = torch.cuda.is_available()
    return {
        "config": asdict(config),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "rows": rows,
        "flatness": {method: flatness(memory, method) for method in METHODS if method != OFFICIAL},
        "note": "Memory is the allocator's peak above the bytes allocated before the step." if cuda else NO_CUDA,
        "table": markdown_table(rows),
    }


def flatness(memory: Mapping[Key, Mapping[str, float]], method: str) -> float:
    """Largest over smallest memory of a method over all K, minus 1."""
    sizes = [found["memory"] for (name, _), found in memory.items() if name == method]
    return max(sizes) / min(sizes) - 1

"""Low-rank adapters of frozen layers as a trainable: LoRA, LoCon, LoHa, LoKr and DoRA.

The parametrisations and their forward passes are LyCORIS's (lycoris-lora): it has every kind, its tensors carry the
names that files have, and it leaves the module tree alone, which peft's injection does not. But its `apply_to` leaves a
bound method on each layer, its rebuilt weights have the dtype of the base's, and they stay in memory until backward, as
those of torch.nn.utils.parametrize and of its own functional API would. So its modules are called here from forward
hooks, which are removed again, by the functions of `adapter_outputs`.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..common.advice import without_kernels_advice
from ..common.patterns import TypedPattern
from ..common.rng import derive_seed
from ..config.lora import LoraConfig
from ..formats.lora_names import SECOND_TEXT, TEXT
from ..models.parameters import parameter_refs
from ..models.stored import exact
from .adapter_outputs import dora_output, with_low_rank
from .base import Trainable
from .weights import swapped

log = logging.getLogger(__name__)

_TRANSFORMER = r"\.(proj_in|proj_out)$|\.transformer_blocks\."
_CONVOLUTIONS = (
    r"\.(in_layers\.2|emb_layers\.1|out_layers\.3|skip_connection)$|^diffusion_model\.\w+_blocks\.\d+\.\d\.(op|conv)$"
)
_TEXT_ATTENTION = r"^text_encoders\..*\.(self_attn\.(q|k|v|out)_proj|SelfAttention\.[qkvo])$"
_TEXT_LAYERS = _TEXT_ATTENTION + r"|^text_encoders\..*\.(mlp\.fc[12]|DenseReluDense\.w[io](_[01])?)$"
TARGETS = {
    "attention": rf"^diffusion_model\..*\.attn[12]\.to_(q|k|v|out\.0)$|{_TEXT_ATTENTION}",
    "cross-attention": rf"^diffusion_model\..*\.attn2\.to_(q|k|v|out\.0)$|{_TEXT_ATTENTION}",
    "attention + feed-forward": rf"^diffusion_model\..*({_TRANSFORMER})|{_TEXT_LAYERS}",
    "all": rf"^diffusion_model\..*({_TRANSFORMER})|{_CONVOLUTIONS}|{_TEXT_LAYERS}",
}
"""Regular expressions over layer names. "attention + feed-forward" is sd-scripts' choice (192 layers of SD1.5's UNet,
722 of SDXL's; 72 and 192 of the CLIPs); "all" adds the layers that sd-scripts adds with conv_dim."""


def layers_of(network: nn.Module, name_of: Callable[[str], str] = str) -> dict[str, nn.Module]:
    """Linear and 2D convolution layers of a module tree by `name_of(path)`."""
    layers = network.named_modules()
    return {name_of(path): layer for path, layer in layers if isinstance(layer, nn.Conv2d) or _is_linear(layer)}


def _is_linear(layer: nn.Module) -> bool:
    """Whether a layer is linear: torch's, or one for quantised weights that has the same attributes."""
    weight = getattr(layer, "weight", None)
    has_sizes = hasattr(layer, "in_features") and hasattr(layer, "out_features")
    return isinstance(layer, nn.Linear) or (has_sizes and isinstance(weight, Tensor) and weight.ndim == 2)


def select_layers(layers: Mapping[str, nn.Module], config: LoraConfig) -> dict[str, nn.Module]:
    """The layers that get an adapter, by name. LoRA and DoRA get none on k x k convolutions.

    Raises ValueError for a malformed regex or when nothing matches.
    """
    pattern = config.target_regex if config.targets == "regex" else TARGETS[config.targets]
    expression = TypedPattern("target_regex", pattern, "attn2|proj_in")
    linear_only = config.algorithm in ("LoRA", "DoRA")
    selected = {n: m for n, m in layers.items() if expression.search(n) and not (linear_only and _is_spatial(m))}
    if not selected:
        examples = ", ".join(list(layers)[:2])
        raise ValueError(
            f"targets {config.targets!r} ({pattern!r}) match none of {len(layers)} layers; expected at least one. "
            f"Layer names are such as {examples}."
        )
    return selected


def text_rate(config: LoraConfig, name: str) -> float:
    """Peak learning rate of a text encoder's layer or adapter; 0 where it does not train."""
    return config.text_rates[name.startswith(SECOND_TEXT)]


def _is_spatial(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)


class Adapters(Trainable):
    """One low-rank adapter per layer: fp32 masters named `<layer>.<LyCORIS's tensor name>`.

    The layers' weights are never written, and no reference to them is held: a model may be moved or unloaded meanwhile.

    Args:
        layers: name -> layer of the network, from `select_layers`.
        networks: roots that are frozen while mounted.
        config: algorithm, rank, dropout and rates.
        seed: of the initial values and of dropout.
        device: where the UNet computes, on which its adapters are; that of each layer's weight without it. A model
            that was partly unloaded has weights elsewhere too.

    Attributes:
        modules: LyCORIS's module of each layer.
        alphas: `<layer>.alpha` -> its value.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        networks: list[nn.Module],
        config: LoraConfig,
        seed: int,
        device: torch.device | None = None,
    ):
        self.config, self.seed = config, seed
        self._layers, self._disabled = dict(layers), False
        self._training: bool | None = None
        """Whether the masters are in effect with dropout (True), or values without (False); None while detached."""
        self.modules = {name: _lycoris_module(name, layer, config, seed) for name, layer in layers.items()}
        holder = nn.ModuleDict({str(i): module for i, module in enumerate(self.modules.values())})
        for name, module in self.modules.items():
            own = self._layers[name].weight.device
            module.to(own if device is None or name.startswith(TEXT) else device)
        self._norms = {n: m.dora_scale.detach().flatten().clone() for n, m in self.modules.items() if m.wd}
        names = {str(i): name for i, name in enumerate(self.modules)}
        self._refs = {_renamed(path, names): ref for path, ref in parameter_refs(holder).items()}
        super().__init__({name: ref.tensor for name, ref in self._refs.items()}, networks)
        self.alphas = {f"{name}.alpha": module.alpha.detach().clone() for name, module in self.modules.items()}

    def rate(self, name: str) -> float:
        """A parameter's multiple of the run's learning rate: its text encoder's rate, and LoRA+ (arXiv 2402.12354,
        section 4: the matrix that starts at zero learns faster)."""
        text = text_rate(self.config, name) / self.config.learning_rate if name.startswith(TEXT) else 1.0
        return text * (self.config.lora_plus_ratio if name.endswith(_START_AT_ZERO) else 1.0)

    @contextmanager
    def _mount(self) -> Iterator[None]:
        """Hooks on the layers, which add nothing until `_in_effect`."""
        with ExitStack() as stack:
            for name, layer in self._layers.items():
                stack.callback(layer.register_forward_hook(self._hook(name)).remove)
            yield

    @contextmanager
    def _in_effect(self, values: Mapping[str, Tensor] | None, rng_key: tuple[int, ...]) -> Iterator[None]:
        """Adds the adapters' outputs to those of their layers while entered; see `Trainable.attach`.

        Without `values` dropout is on, drawn from (seed, rng_key) alone; the global random state, which torch's and
        LyCORIS's dropout use, is restored afterwards.
        """
        training, before = values is None, self._training
        with ExitStack() as stack:
            if not training:
                stack.enter_context(swapped(self._refs, values))
            elif self.config.has_dropout:
                stack.enter_context(_seeded(derive_seed(self.seed, "dropout", *rng_key), self._devices()))
            try:
                self._set_mode(training)
                yield
            finally:
                self._set_mode(before)

    def _set_mode(self, training: bool | None) -> None:
        self._training = training
        for module in self.modules.values():
            if training is not None and module.training != training:
                module.train(training)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        before, self._disabled = self._disabled, True
        try:
            yield
        finally:
            self._disabled = before

    def lora_model(self, values: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """ComfyUI's LORA_MODEL: copies of the tensors, fp32 on the CPU, alphas included."""
        values = self.values() if values is None else values
        return {
            name: value.detach().to("cpu", torch.float32, copy=True) for name, value in (values | self.alphas).items()
        }

    def _devices(self) -> list[torch.device]:
        return list({layer.weight.device for layer in self._layers.values() if layer.weight.device.type == "cuda"})

    def _hook(self, name: str) -> Callable:
        config, module, norms = self.config, self.modules[name], self._norms.get(name)

        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x, training = inputs[0], self._training
            if training is None or self._disabled:
                return output
            if training and config.module_dropout and torch.rand(()).item() < config.module_dropout:
                return output
            if training and config.dropout:
                x = nn.functional.dropout(x, config.dropout)
            if norms is None:
                return with_low_rank(module, x, output)
            return output + dora_output(module, layer, norms, x).to(output)

        return add


_START_AT_ZERO = ("lora_up.weight", "hada_w2_a", "lokr_w2", "lokr_w2_b")


def _lycoris_module(name: str, layer: nn.Module, config: LoraConfig, seed: int) -> nn.Module:
    """LyCORIS's module for one layer, its initial values drawn from (seed, name)."""
    with without_kernels_advice():
        from lycoris.modules.locon import LoConModule
        from lycoris.modules.loha import LohaModule
        from lycoris.modules.lokr import LokrModule

    kinds = {"LoHa": LohaModule, "LoKr": LokrModule}
    rank, alpha = config.shape_of(spatial=_is_spatial(layer))
    plain, dora = _plain(layer), config.algorithm == "DoRA"
    if dora:  # its magnitude starts as the weight's
        plain.weight = nn.Parameter(exact(layer.weight.detach()), requires_grad=False)
    with _seeded(derive_seed(seed, "adapter", name), []), contextlib.redirect_stdout(io.StringIO()):
        module = kinds.get(config.algorithm, LoConModule)(
            name.replace(".", "_"),
            plain,
            lora_dim=rank,
            alpha=alpha,
            rank_dropout=config.rank_dropout,
            weight_decompose=dora,
            wd_on_out=False,
            bypass_mode=True,
            **({"factor": config.lokr_factor} if config.algorithm == "LoKr" else {}),
        ).float()
    plain.weight = None  # LyCORIS keeps the layer that it was made for
    return module


def _plain(layer: nn.Module) -> nn.Module:
    """torch's own layer of the same shape, without values: LyCORIS creates its factors with the layer's class, and
    ComfyUI's classes draw no initial values, or hold no weights at all."""
    if isinstance(layer, nn.Conv2d):
        geometry = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)
        more = {"dilation": layer.dilation, "groups": layer.groups}
        return nn.Conv2d(*geometry, **more, bias=False, device="meta")
    return nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")


def _renamed(path: str, names: Mapping[str, str]) -> str:
    index, _, rest = path.partition(".")
    return f"{names[index]}.{rest}"


@contextmanager
def _seeded(seed: int, devices: list[torch.device]) -> Iterator[None]:
    """Seeds torch's global random state while entered, and restores it."""
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield

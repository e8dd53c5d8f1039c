"""What adapters add to their layers' outputs, without a product of the size of a weight that is kept for backward."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..common.transfer import upload_as
from ..models.recast import RecastTransposed, arithmetic_dtype, cast, geometry_of, product


def with_low_rank(module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    """output + dW x, of a LyCORIS module.

    LoRA and LoCon of a linear layer are one product more than the layer: s B is multiplied with A x and added to the
    output in the same pass over it. LyCORIS makes three passes, and on a GPU it compiles kernels first.
    """
    if module.name != "locon" or module.isconv or _draws(module):
        return output + low_rank_output(module, x).to(output)
    down, up = module.lora_down.weight.to(output), module.lora_up.weight.to(output)
    reduced = F.linear(x.to(output), down).flatten(0, -2)
    return torch.addmm(output.flatten(0, -2), reduced, up.t(), alpha=float(module.scale)).view_as(output)


def low_rank_output(module: nn.Module, x: Tensor) -> Tensor:
    """dW x of a LyCORIS module.

    LoHa's dW = (A1 B1) * (A2 B2) is as large as the weight, and its product with x keeps it for backward; so it is made
    again there. LoRA, LoCon and LoKr apply their factors one after another.
    """
    if module.name == "locon" and not _draws(module):
        return two_products(module, x)
    if module.name != "loha":
        return module.bypass_forward_diff(x)
    output = module.bypass_forward_diff if x.device.type == "cpu" else partial(hadamard_output, module)
    if not torch.is_grad_enabled():
        return output(x)
    return checkpoint(output, x, use_reentrant=False, preserve_rng_state=_draws(module))


def two_products(module: nn.Module, x: Tensor) -> Tensor:
    """s B A x of LoRA and LoCon by torch's own products, s multiplied into B, the smallest of them."""
    up = (module.lora_up.weight * module.scale).to(x)
    if not module.isconv:
        return F.linear(F.linear(x, module.lora_down.weight.to(x)), up)
    down = module.lora_down
    return F.conv2d(F.conv2d(x, down.weight.to(x), None, **geometry_of(down)), up)


def hadamard_output(module: nn.Module, x: Tensor) -> Tensor:
    """s ((A1 B1) * (A2 B2)) x of LoHa by torch's own products, rows dropped as LyCORIS does.

    LyCORIS makes a tensor of s each time, for which the host waits, and its kernels for GPUs read that again. On a CPU
    its order of operations stays.
    """
    weight = (module.hada_w1_a @ module.hada_w1_b) * (module.hada_w2_a @ module.hada_w2_b) * module.scale
    if _draws(module):
        kept = torch.rand(len(weight)) > module.rank_dropout
        weight = weight * upload_as(kept, weight)[:, None]
    return module.op(x, weight.reshape(module.shape).to(x), **module.kw_dict)


def _draws(module: nn.Module) -> bool:
    return module.training and bool(module.rank_dropout)


def dora_output(module: nn.Module, layer: nn.Module, norms: Tensor, x: Tensor) -> Tensor:
    """(W' - W) x with W' = m (W + dW) / ||W + dW||, dW = s B A (arXiv 2402.09353, eq. 5), the norm over everything but
    the input axis, as in LyCORIS with wd_on_out off, the axis on which all readers of such files agree.

    Being per input, g = m / ||W + dW|| scales the activations: (W' - W) x = W ((g - 1) x) + s B A (g x), and no W' is
    formed. Section 4.3 of the paper takes the norm for a constant in backward, since it would keep W'; here it keeps
    nothing of that size (`merged_norms`), so the gradient is the exact one.

    Args:
        module: LyCORIS's, with lora_down (A), lora_up (B) and dora_scale (m).
        layer: linear, or a convolution with a 1 x 1 kernel.
        norms: (inputs,) norms of W.
        x: the layer's input.
    """
    with torch.autocast(x.device.type, enabled=False):
        gain = module.dora_scale.flatten() / merged_norms(module, layer, norms)
    shape = (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
    gain, dtype = gain.reshape(shape), arithmetic_dtype(x)
    difference = product(layer, (x * (gain - 1)).to(dtype))
    return difference + low_rank_output(module, (x * gain).to(dtype))


def merged_norms(module: nn.Module, layer: nn.Module, norms: Tensor) -> Tensor:
    """||W + s B A|| of each input, (inputs,) fp32, with a gradient to A and B.

    For a column: ||w + s B a||^2 = ||w||^2 + 2 s (B^T w) a + s^2 a (B^T B) a, of which nothing is larger than A.
    """
    up, down, weight = module.lora_up.weight.flatten(1), module.lora_down.weight.flatten(1), layer.weight
    dtype = weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else torch.float32
    projected = RecastTransposed.apply(up.t().to(dtype), weight, cast).float()
    cross, square = (projected * down).sum(0), ((up.t() @ up) @ down * down).sum(0)
    return (norms.square() + 2 * module.scale * cross + module.scale**2 * square).clamp(min=1e-24).sqrt()

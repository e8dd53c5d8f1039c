"""Random layers of every LoRA algorithm by LyCORIS's names, each with the weight that comes of it computed by hand.

Loaded by the fixture `lora_kinds`: every test file gets the same ones.
"""

import torch

RANK = 3
ALPHA = 1.5


def drawn(*shape, seed=0, scale=0.3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def lora(shape, seed):
    down = drawn(RANK, *shape[1:], seed=seed)
    up = drawn(shape[0], RANK, *(1 for _ in shape[2:]), seed=seed + 1)
    change = ALPHA / RANK * (up.flatten(1) @ down.flatten(1)).reshape(shape)
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(ALPHA)}, lambda w: w + change


def flat_lora(shape, seed):
    """As ComfyUI's own trainer saves a convolution."""
    tensors, result = lora(shape, seed)
    return {name: value.flatten(1) if value.ndim else value for name, value in tensors.items()}, result


def tucker(shape, seed):
    up, down = drawn(shape[0], RANK, 1, 1, seed=seed), drawn(RANK, shape[1], 1, 1, seed=seed + 1)
    mid = drawn(RANK, RANK, *shape[2:], seed=seed + 2)
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "lora_mid.weight": mid, "alpha": torch.tensor(ALPHA)}
    change = torch.einsum("om,mnhw,ni->oihw", up[..., 0, 0], mid, down[..., 0, 0])
    return tensors, lambda w: w + ALPHA / RANK * change


def loha(shape, seed):
    columns = shape[1:].numel()
    a, c = (drawn(shape[0], RANK, seed=seed + i, scale=0.7) for i in (0, 1))
    b, d = (drawn(RANK, columns, seed=seed + i, scale=0.7) for i in (2, 3))
    tensors = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": torch.tensor(ALPHA)}
    return tensors, lambda w: w + ALPHA / RANK * ((a @ b) * (c @ d)).reshape(shape)


def lokr(shape, seed):
    w1, a = drawn(4, 4, seed=seed), drawn(shape[0] // 4, RANK, seed=seed + 1)
    b = drawn(RANK, shape[1:].numel() // 4, seed=seed + 2)
    second = (a @ b).reshape(shape[0] // 4, shape[1] // 4, *shape[2:])
    product = torch.einsum("pq,rs...->prqs...", w1, second).reshape(shape)
    tensors = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(ALPHA)}
    return tensors, lambda w: w + ALPHA / RANK * product


def lokr_whole(shape, seed):
    w1, w2 = drawn(4, 4, seed=seed), drawn(shape[0] // 4, shape[1] // 4, *shape[2:], seed=seed + 1)
    product = torch.einsum("pq,rs...->prqs...", w1, w2).reshape(shape)
    return {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(7.0)}, lambda w: w + product


def dora(axis):
    """m (W + dW) / ||W + dW||, one m per output (axis 0) or input (1)."""

    def make(shape, seed):
        tensors, result = lora(shape, seed)
        sizes = [shape[axis] if i == axis else 1 for i in range(len(shape))]
        scale = (drawn(shape[axis], seed=seed + 5).abs() + 0.5).reshape(sizes)

        def merged(w):
            norm = result(w).transpose(0, axis).flatten(1).norm(dim=1).reshape(sizes)
            return result(w) * scale / norm

        return tensors | {"dora_scale": scale}, merged

    return make


def full(shape, seed):
    return {"diff": drawn(*shape, seed=seed)}, lambda w: w + drawn(*shape, seed=seed)


KINDS = {
    "LoRA": lora,
    "flat LoRA": flat_lora,
    "LoHa": loha,
    "LoKr": lokr,
    "LoKr, whole": lokr_whole,
    "DoRA, inputs": dora(1),
    "DoRA, outputs": dora(0),
    "full": full,
}

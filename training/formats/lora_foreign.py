"""Adapters and files that are known but not read as a LoRA: what they are, and what to use instead."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_MERGE = "Merge it into its model with the tool that made it, and use that model, or a LoRA made of it by extract-lora."
_ADAPTERS = (
    (r"\.ia3_l(\.|$)|\.on_input$", "IA3, which multiplies a layer's inputs or outputs", _MERGE),
    (r"\.oft_[Rr](\.|$)", "peft's OFT (oft_R), which rotates a layer's inputs", _MERGE + " LyCORIS's OFT is read."),
    (r"\.oft_diag$", "LyCORIS's OFT of an early version (oft_diag)", _MERGE),
    (r"\.boft_[RSs](\.|$)", "peft's BOFT, which rotates a layer's inputs", _MERGE),
    (r"\.lora_diag(\.|$)", "peft's KaSA, which changes the base model too", _MERGE),
    (r"\.lora_embedding_[AB](\.|$)", "a LoRA of token embeddings (lora_embedding_A)", _MERGE),
    (
        r"\.(?:vera_lambda_[bd]|randlora_lambda|randlora_gamma)(\.|$)",
        "VeRA or RandLoRA, of shared random factors",
        _MERGE,
    ),
    (
        r"\.(?:hra|fourierft|vblora|bone|miss|c3a|shira|road|delora|waveft|gralora|hira|glora|psoft|tinylora|unilora|"
        r"lily|frod|deft|osf|poly|adamss|beft|peanut|supertuning)_\w+(\.|$)",
        "an adapter of peft's that is no LoRA",
        _MERGE,
    ),
)
_FILES = (
    (r"(?:to_q_ip|to_k_ip|^ip_adapter\.|^image_proj\.)", "an IP-Adapter", "Use it with a node for IP-Adapters."),
    (r"^(?:bundle_emb\.|string_to_param)", "an embedding (textual inversion)", "Move it to models/embeddings."),
    (r"(?:zero_convs|controlnet_)", "a ControlNet", "Move it to models/controlnet."),
    (r"\.(?:qweight|qzeros|absmax|quant_state|wscales|SCB)(\.|$)", "a quantised model", "Use its original."),
    (r"(?:^model\.)?diffusion_model\.\S+\.(?:weight|bias)$", "a checkpoint", "Move it to models/checkpoints."),
)
"""Pattern of keys -> what a file with such a key is, and what to do. Adapters may not be left out of a LoRA's file."""


def foreign_adapter(keys: Iterable[str]) -> tuple[str, str, str] | None:
    """(key, what it is, what to do) for the first key of an adapter that is not read; None without one."""
    return next(_recognised(keys, _ADAPTERS), None)


def foreign_content(keys: Iterable[str]) -> str:
    """What a file without a LoRA is, in sentences; "" where nothing tells."""
    found = next(_recognised(keys, _FILES), None)
    return f" It is {found[1]}. {found[2]}" if found else ""


def _recognised(keys: Iterable[str], kinds: tuple) -> Iterator[tuple[str, str, str]]:
    patterns = [(re.compile(pattern), what, advice) for pattern, what, advice in kinds]
    return ((key, what, advice) for key in keys for pattern, what, advice in patterns if pattern.search(key))

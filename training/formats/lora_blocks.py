"""A LoRA's weights per UNet block, in the syntax of sd-webui-lora-block-weight or as `regex=weight` lines."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ..common.patterns import TypedPattern

_BLOCK = re.compile(r"(input_blocks|middle_block|output_blocks)\.(\d+)\.")
_SHORT = {"input_blocks": "IN", "middle_block": "M", "output_blocks": "OUT"}


@dataclass(frozen=True)
class BlockWeights:
    """Weights by parameter name: the first rule whose expression is found in the name decides, else the weight is 1."""

    rules: tuple[tuple[TypedPattern, float], ...] = ()

    def weight_for(self, name: str) -> float:
        """The weight for a parameter, such as `diffusion_model.output_blocks.3.1.proj_in.weight`."""
        return next((weight for pattern, weight in self.rules if pattern.search(name)), 1.0)

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """The expressions that match none of the names."""
        names = list(names)
        return [pattern.expression for pattern, _ in self.rules if not any(pattern.search(name) for name in names)]


def block_names(names: Iterable[str], with_attention: bool = False) -> list[str]:
    """Block names of a UNet with these parameters: IN00, ..., M00, OUT00, ...; optionally only those with attention."""
    blocks = set()
    for name in names:
        match = _BLOCK.search(name)
        if match and (not with_attention or "transformer_blocks" in name):
            blocks.add((match[1], 0 if match[1] == "middle_block" else int(match[2])))
    return [f"{_SHORT[kind]}{number:02}" for kind, number in sorted(blocks)]


def block_weights(text: str, names: Iterable[str]) -> BlockWeights:
    """Parses block weights for a UNet.

    Args:
        text: Comma-separated numbers: BASE (the text encoder and parameters outside of blocks), then one number for
            each block with attention (17 in all for SD1.x, 12 for SDXL; blocks without attention get 0) or for every
            block (26, 20). Or lines `regex=weight`. Empty: weight 1 everywhere.
        names: The UNet's parameter names.

    Raises:
        ValueError: Another count of numbers, an invalid expression, or a weight that is no finite number.
    """
    if not text.strip():
        return BlockWeights()
    if "=" in text:
        lines = (line.strip() for line in re.split(r"[\n;]", text))
        return BlockWeights(tuple(_rule(line) for line in lines if line))
    names = list(names)
    weights = [_number(part) for part in text.strip().rstrip(",").split(",")]
    every, attention = block_names(names), block_names(names, with_attention=True)
    if not every:
        raise ValueError(f"blocks is {text!r}, but the model has no input_blocks; expected lines such as regex=weight.")
    blocks = {1 + len(every): every, 1 + len(attention): attention}.get(len(weights))
    if blocks is None:
        raise ValueError(
            f"blocks has {len(weights)} numbers; expected {1 + len(attention)} (BASE, {', '.join(attention)}) or "
            f"{1 + len(every)} (BASE, {', '.join(every)}). Or write lines regex=weight."
        )
    by_block = dict.fromkeys(every, 0.0) | dict(zip(blocks, weights[1:], strict=True))
    rules = tuple((_pattern(_expression(block)), weight) for block, weight in by_block.items())
    return BlockWeights((*rules, (_pattern(""), weights[0])))


def _expression(block: str) -> str:
    """The regular expression for a block's parameters, such as `\\binput_blocks\\.4\\.` for IN04."""
    kind, number = next((kind, block.removeprefix(s)) for kind, s in _SHORT.items() if re.fullmatch(rf"{s}\d+", block))
    return rf"\b{kind}\." + ("" if kind == "middle_block" else rf"{int(number)}\.")


def _pattern(expression: str) -> TypedPattern:
    return TypedPattern("blocks", expression, "output_blocks")


def _rule(line: str) -> tuple[TypedPattern, float]:
    """Parses a line `regex=weight`."""
    expression, separator, weight = line.rpartition("=")
    if not separator:
        raise ValueError(f"blocks has the line {line!r}; expected regex=weight, such as output_blocks=0.5.")
    return _pattern(expression.strip()), _number(weight)


def _number(text: str) -> float:
    """Parses a finite number; ValueError for anything else."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"blocks has {text.strip()!r}; expected a number, such as 0.5.")
    return value

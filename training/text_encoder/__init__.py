"""T5 as a text encoder: its files, tokenizers, projections to a UNet's width, fit, scale and blends."""

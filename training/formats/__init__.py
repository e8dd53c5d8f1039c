"""LoRA and embedding files of every tool, read and written. Layouts of whole models are in models."""

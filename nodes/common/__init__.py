"""Shared by all of nodes/: input and output types, inputs, ComfyUI's folders, patched weights, the demo model."""

"""What all of nodes/ stands on: wire types, shared inputs, ComfyUI folders, patched weights, the demo loader."""

"""A run in ComfyUI's interface: progress, signs of life, routes of the runs panel."""

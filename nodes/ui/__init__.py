"""A run in ComfyUI's interface: progress, texts in long phases, HTTP routes of the runs panel."""

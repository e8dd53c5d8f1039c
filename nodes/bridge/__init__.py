"""ComfyUI's MODEL, CLIP and VAE as the core's view of a model, and results back as patches."""

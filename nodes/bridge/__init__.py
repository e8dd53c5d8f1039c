"""ComfyUI's MODEL, CLIP, VAE and rewards as the core's protocols, and training results back as patches."""

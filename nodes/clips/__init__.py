"""ComfyUI CLIP objects made here: T5 with a projection, blended, timed; concept tokens; CLIPs to files and back."""

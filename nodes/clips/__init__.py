"""ComfyUI CLIP objects of our own: T5, blended, kept, timed; words in prompts; saved text encoders."""

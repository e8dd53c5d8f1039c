"""The core: model views, training loop, text encoders, data and formats. Imports neither ComfyUI nor `nodes`."""

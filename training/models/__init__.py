"""The view of a text-to-image model (`protocols`) and its implementation for diffusers and transformers modules.

ComfyUI's MODEL, CLIP and VAE are in nodes/bridge; T5 and its projections in text_encoder.
"""

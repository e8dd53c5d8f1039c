"""A text-to-image model as three protocols (`protocols`), implemented over diffusers and transformers modules.

ComfyUI's MODEL, CLIP and VAE are in nodes/bridge; T5 and its projections in text_encoder.
"""

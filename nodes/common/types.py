"""Types of this package's inputs and outputs; LORA_MODEL and LOSS_MAP are types of ComfyUI too."""

from comfy_api.latest import io

Dataset = io.Custom("RETUNE_DATASET")
Settings = io.Custom("RETUNE_SETTINGS")
Samples = io.Custom("RETUNE_SAMPLES")
Embedding = io.Custom("RETUNE_EMBEDDING")
Reward = io.Custom("RETUNE_REWARD")
Run = io.Custom("RETUNE_RUN")
LossMap = io.Custom("LOSS_MAP")
LoraModel = io.Custom("LORA_MODEL")

"""One file for each training: UNet, LoRA, textual inversion, reward tuning. `run` carries all of them out."""

"""One file a training (UNet, LoRA, textual inversion, reward tuning): its trainable, objective and result, run by
`run`.
"""

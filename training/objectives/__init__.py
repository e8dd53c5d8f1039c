"""Losses to minimise: the denoising loss, rewards through the sampler or on images, constraints."""

"""Differentiable rewards: scores of images, by a prompt or alone, whose gradients reach the pixels."""

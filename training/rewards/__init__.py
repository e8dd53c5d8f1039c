"""Scores of images, differentiable to their pixels: CLIP towers, aesthetic heads, weighted sums, diversity."""

"""Scores of images whose gradient reaches the pixels: towers, heads, sums of several, diversity."""

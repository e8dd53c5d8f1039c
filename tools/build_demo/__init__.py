"""Trains the demo model and writes its weights: `python -m retune.tools.build_demo`. Not installed with the package."""

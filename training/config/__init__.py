"""Settings of runs and commands: frozen dataclasses that nodes, command line and config.json share, and their checks.

No tensors and no work: recipes and commands read a config and do what it describes.
"""

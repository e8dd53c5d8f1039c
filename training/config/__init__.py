"""What a run can be asked for: frozen dataclasses that nodes, command line and config.json share, and their checks.

No tensors and no work: a config says what is wanted, recipes do it.
"""

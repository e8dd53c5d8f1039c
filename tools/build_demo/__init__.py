"""Building the demo model: `python -m retune.tools.build_demo`. Not part of the installed package."""

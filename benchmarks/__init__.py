"""Timings and studies on the demo model: `python run.py bench`. Not part of the installed package."""

"""The demo models that versions of this package shipped, to say by name which one a file or a run was made with."""

UNETS = {"ee2e97ad86ce5e00b1c5de4bcd4e2f78": "the demo model of versions 0.1 to 0.3"}
"""Fingerprint of the UNet -> what it is called."""

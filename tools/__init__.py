"""Programs for those who work on the package. Not part of the installed package."""

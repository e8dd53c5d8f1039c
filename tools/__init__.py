"""Programs for developers of the package. Not part of the installed package."""

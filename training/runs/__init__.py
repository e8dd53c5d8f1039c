"""A run as a folder: its files, rows, samples, report, list, and how it ended. Nothing here trains."""

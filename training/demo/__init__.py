"""The demo model's files, its drawn scenes and the judge that reads them. How it was made: tools/build_demo."""

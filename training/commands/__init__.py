"""What a verb of the command line or a page asks for: open a model, convert files, evaluate, export, demo."""

"""What every folder stands on: files, random draws by name, fingerprints, several processes, callbacks. Nothing of
models or runs.
"""

"""Files, random generators by name, fingerprints, several processes, callbacks: for every folder above. Nothing about
models or runs.
"""

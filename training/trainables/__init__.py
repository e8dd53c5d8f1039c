"""Trainables: fp32 masters of weights, adapters and token embeddings, put in effect for a step."""

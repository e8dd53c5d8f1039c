"""What trains, as fp32 masters that are put in effect for a step: weights, adapters, token embeddings."""

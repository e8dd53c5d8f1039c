"""The one training loop with its optimisers and saved states. What trains and what is minimised come from outside."""

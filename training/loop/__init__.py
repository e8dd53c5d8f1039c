"""The one training loop with its optimizers and saved states. Trainable and objective come from outside."""

"""What a user writes: two losses, a model, hyperparameters and data splits."""

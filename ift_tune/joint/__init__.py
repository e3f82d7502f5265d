"""Joint optimisation of weights and hyperparameters, and its settings."""

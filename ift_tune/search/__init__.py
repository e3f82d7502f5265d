"""The outer search: a space of meta-hyperparameters, and what drives its trials."""

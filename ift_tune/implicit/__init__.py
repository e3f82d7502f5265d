"""The mathematics: hypergradients by the implicit function theorem, on any losses."""

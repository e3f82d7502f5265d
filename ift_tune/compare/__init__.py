"""IFT against random search and others at equal budget: arms, statistics, verdict."""

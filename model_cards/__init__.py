"""Templates of model cards, and where every family of weights comes from."""

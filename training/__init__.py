"""How a model learns: datasets, collators, samplers, trainers and recipes."""

"""What a model computes: encoders, connectors, the VLM, processors, box geometry and kernels."""

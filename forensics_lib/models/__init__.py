"""The network of both tasks, its backbones, and its checkpoints."""

"""What a training step keeps: checkpointing, memory-efficient modules, offload, compile."""

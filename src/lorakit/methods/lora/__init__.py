"""LoRA: its targets, its start, and its later forms DoRA, PiSSA and EVA."""

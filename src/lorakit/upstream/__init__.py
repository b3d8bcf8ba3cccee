"""What lorakit leans on in torch and transformers beyond their public names."""

"""Frozen backbones: from photos and prompts to tensors, and back."""

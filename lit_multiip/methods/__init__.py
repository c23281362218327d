"""What is trained: aggregators, the adapter, DreamBooth."""

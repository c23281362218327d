"""A run as the files that plain diffusers loads, with their model card."""

"""lit_multiip."""

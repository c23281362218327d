"""Multi-photo IP-Adapter: personalised images from several photos of a person, in PyTorch Lightning."""

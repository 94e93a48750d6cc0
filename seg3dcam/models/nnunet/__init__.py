"""Trained nnU-Net v2 folders as models."""

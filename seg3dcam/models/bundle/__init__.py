"""MONAI bundles as models."""

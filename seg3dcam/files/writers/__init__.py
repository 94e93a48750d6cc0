"""Volumes and masks as files of other programs: one module, one format."""

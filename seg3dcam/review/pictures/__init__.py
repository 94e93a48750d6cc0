"""Pictures of a case as files: one module, one kind."""

"""Starting the workers of a run, watching over them, and leaving none behind."""

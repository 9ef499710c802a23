"""What went wrong in a run, read off its logs and records: text in, a diagnosis out."""

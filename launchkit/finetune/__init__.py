"""What runs inside the workers: the built-in fine-tune, users' scripts unchanged, and the measuring of both."""

"""Open answers graded by a language model that the user names."""

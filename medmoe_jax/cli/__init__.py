"""The medmoe command."""

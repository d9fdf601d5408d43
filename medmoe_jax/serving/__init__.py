"""Models behind HTTP, as OpenAI's clients ask them."""

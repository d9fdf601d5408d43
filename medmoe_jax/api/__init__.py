"""What `import medmoe_jax` offers, and what the commands are made of."""

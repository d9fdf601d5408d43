"""Recipes, stages, the training step and the loop."""

"""Decoding and scoring with a base and its banks."""

"""What a compiled program costs before it runs: FLOPs, bytes, collectives, memory."""

"""Banks of low-rank experts, the sites they sit on, and their lifecycle."""

"""What is kept on disk: runs, manifests, fingerprints and foreign weight formats."""

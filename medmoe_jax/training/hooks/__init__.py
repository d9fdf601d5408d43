"""What watches the steps of a stage: figures, logs, the progress bar, the profiler."""

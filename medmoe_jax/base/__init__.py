"""The frozen decoder: configuration, layers, attention, losses. Complete without adapters."""

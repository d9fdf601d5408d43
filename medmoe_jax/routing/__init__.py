"""Routers, dispatch strategies and their telemetry."""

"""Kubernetes, asked from outside: a request to helm, and what became of its RayJob."""

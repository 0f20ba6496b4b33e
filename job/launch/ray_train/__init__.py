"""Ray: the workers of a cluster, joined by Ray Train; and jobs of a cluster that is asked from outside."""

"""SLURM: asked from outside (a request to sbatch, and what became of it), started inside (ranks on the nodes)."""

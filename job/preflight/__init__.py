"""Before a run holds its GPUs for hours: what each node is, which one is bad, and how fast they speak to each other."""

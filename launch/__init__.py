"""Around the job: local, Slurm and Kubernetes launchers, checks before the start. No torch at import."""

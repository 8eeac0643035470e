"""Everything around a job: launchers for this machine, Slurm and Kubernetes, and the checks before the start.
Does not import torch.
"""

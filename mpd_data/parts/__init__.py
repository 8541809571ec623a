"""Divide one stage among processes, SLURM tasks or Ray actors."""

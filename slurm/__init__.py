"""Running a stage's tasks on a SLURM cluster."""

"""What people look at: an artifact's facts as plain data, and those as one page that needs nothing else."""

"""Learning masks: the job, the loop, its processes and files."""

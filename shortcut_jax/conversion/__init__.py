"""The work of `convert`: sources gathered into a job, and the job written."""

"""What training streams: sets, their schedule and the pipeline."""

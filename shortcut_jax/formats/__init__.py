"""Files of others and of ours that hold weights: read, recognised, written."""

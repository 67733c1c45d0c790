"""The life and death of processes: joining, claims, signs of life, logs."""

"""Networks that judge pictures, opened and run on all devices of this process."""

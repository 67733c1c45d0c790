"""Pure and jittable: objectives, the train step, sampling, editing."""

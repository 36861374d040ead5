"""One denoising step: which parked calls run, how they merge, and how their rows are split again."""

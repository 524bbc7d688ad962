"""What every training run needs around its loop: checkpoints, the log, processes."""

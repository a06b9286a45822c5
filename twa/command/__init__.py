"""The command `twa`: averages of a folder of checkpoints, without their model's code."""

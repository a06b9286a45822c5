"""What the scripts share: data, the loop, runs and their states, flags, ranks, reports."""

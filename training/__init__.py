"""What the scripts share: data, the loop, flags, ranks, reports."""

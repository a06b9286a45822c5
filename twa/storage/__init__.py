"""The basis in memory: its columns and blocks, how much memory it takes, and its stored matrix."""

"""What a run or a server needs, before anything is loaded: memory, disk, FLOPs and time."""

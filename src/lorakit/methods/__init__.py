"""What is trained: each method is one file and reads like its paragraph of the paper."""

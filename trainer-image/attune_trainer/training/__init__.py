"""Training: what happens inside the processes that DeepSpeed's launcher starts, and how they are started."""

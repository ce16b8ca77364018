"""What the operator and the training image say to each other; nothing here imports either of them."""

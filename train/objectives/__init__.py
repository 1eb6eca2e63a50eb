"""What is trained for: batches drawn and their loss."""

"""What is in a message, and how replies are combined."""

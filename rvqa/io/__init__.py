"""What is written whole or not at all, and what is read with bounds."""

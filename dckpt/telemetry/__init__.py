"""What is told to the outside while a run trains."""

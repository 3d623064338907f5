"""What is measured, a module each: a title, the job that runs on the ranks, and the lines that it is judged by."""

"""What is asked: methods and their numbers, from the command line or a file. Loads no torch."""

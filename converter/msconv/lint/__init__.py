"""What is wrong with a checkpoint, before anything else finds it: its files, its names, its numbers.

Nothing is converted, and nothing stops at the first problem.
"""

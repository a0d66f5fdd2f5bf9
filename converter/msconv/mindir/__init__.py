"""MindIR files: written canonically, read as a list of steps, executed node by node.  Knows no artifact."""

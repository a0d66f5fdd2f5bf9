"""One file a command that makes or changes an artifact: convert, plan (estimate), reshard, compile.

Only the command line and other steps import from here.  What steps share with the rest stands below them: the
artifact's directory in `workspace/`, the moving of weights in `stream/`, where a checkpoint is in `location`.
"""

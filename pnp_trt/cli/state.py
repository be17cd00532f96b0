"""State of the running command."""

#: whether errors are shown with their tracebacks (``--debug``)
debug = False

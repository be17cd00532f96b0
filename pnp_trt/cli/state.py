"""State of one run of the program."""

#: whether errors are shown with their tracebacks (``--debug``)
debug = False

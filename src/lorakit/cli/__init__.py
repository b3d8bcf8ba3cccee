"""The command line: one verb is one module here, with its settings and a function that runs it."""

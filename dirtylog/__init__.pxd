# Lets other packages cimport from dirtylog.

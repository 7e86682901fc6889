# Lets the other extension modules cimport from here.

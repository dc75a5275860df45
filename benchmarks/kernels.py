"""Every kernel beside its floor and its peers: see kernel_table.py, which this runs."""

# Nothing else may stand here: transformers looks for a package of this file's name, `kernels`, and
# imports what it finds while it is being imported itself.
if __name__ == "__main__":
    from kernel_table import main

    main()

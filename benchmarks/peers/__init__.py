"""Scripts that do the sweep with other libraries.

Each script runs in its own environment. All take the same arguments and write a results file of the same form.
"""

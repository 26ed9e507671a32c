"""The ground floor of every long job: options, folder, result, progress, tensors, figures.

Import what is needed from its module; importing this package loads nothing.
"""

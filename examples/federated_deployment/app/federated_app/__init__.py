"""The two halves of the federation: :mod:`federated_app.client`, :mod:`federated_app.server`."""

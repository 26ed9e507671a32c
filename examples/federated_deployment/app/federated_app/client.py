"""What runs on every SuperNode: trains on its part of the data."""

from cmd_plugin.jobs.federated import make_client_app

app = make_client_app()
